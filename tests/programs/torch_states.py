"""Makes torch_states.safetensors: PyTorch's Adam before and after a few steps, and the gradients between.

Not a test: run once with PyTorch 2.13 and safetensors, ``python tests/programs/torch_states.py``. Its `write` and
`read` are the code in the docstring of `jadam.torch_state`; here they are executed, as a new optimizer reads the state
of the first one and takes the second half of the steps.
"""

import tempfile
from pathlib import Path

LR, BETAS, EPS, BEFORE, STEPS = 0.01, (0.85, 0.95), 1e-6, 3, 4

# name: (class in torch.optim, further arguments)
OPTIMIZERS = {
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {"weight_decay": 0.1}),
    "amsgrad": ("Adam", {"amsgrad": True}),
}
FILE = Path(__file__).with_suffix(".safetensors")


def write(model, optimizer, path):
    import safetensors.torch
    import torch

    name_of = {p: name for name, p in model.named_parameters()}
    order = [name_of[p] for group in optimizer.param_groups for p in group["params"]]  # as state_dict counts them
    saved = optimizer.state_dict()["state"]
    flat = {f"{order[i]}.{key}": torch.as_tensor(x).contiguous() for i in saved for key, x in saved[i].items()}
    safetensors.torch.save_file(flat, path)
    return flat, order


def read(optimizer, order, path):
    import safetensors.torch

    flat = safetensors.torch.load_file(path)
    state = {i: {} for i in range(len(order))}
    for key, x in flat.items():
        name, _, entry = key.rpartition(".")
        state[order.index(name)][entry] = x
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def trained(name, path):
    import torch

    torch.manual_seed(0)
    layers = torch.nn.Conv2d(4, 5, (3, 2)), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(45, 7)
    model = torch.nn.Sequential(*layers)
    cls, kwargs = OPTIMIZERS[name]
    groups = [
        {"params": list(module.parameters())} for module in (model[3], model[0])
    ]  # another order than the model's
    make = lambda: getattr(torch.optim, cls)(groups, lr=LR, betas=BETAS, eps=EPS, **kwargs)
    out, gradients = {}, []

    def keep(when):
        flat, order = write(model, optimizer, path)
        out.update({f"{name}/{when}/state/{key}": x.clone() for key, x in flat.items()})
        out.update({f"{name}/{when}/params/{key}": p.detach().clone() for key, p in model.named_parameters()})
        return order

    optimizer = make()
    for step in range(BEFORE + STEPS):
        if step == BEFORE:
            order = keep("before")
            optimizer = make()
            read(optimizer, order, path)
        x, y = torch.randn(8, 4, 5, 4), torch.randn(8, 7)
        optimizer.zero_grad()
        (0.5**step * (model(x) - y) ** 2).mean().backward()  # shrinking, so that AMSGrad's maximum differs from v
        optimizer.step()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters()})
    keep("after")
    for key in gradients[0]:
        out[f"{name}/gradients/{key}"] = torch.stack([g[key] for g in gradients[BEFORE:]])
    return out


def main():
    import safetensors.torch
    import torch

    out = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in OPTIMIZERS:
            out |= trained(name, Path(folder) / "adam.safetensors")
    safetensors.torch.save_file(out, FILE, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
