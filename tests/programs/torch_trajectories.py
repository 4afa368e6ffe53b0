"""Makes torch_trajectories.npz: parameters after each of 60 float64 steps of PyTorch's optimizers.

Not a test: run once with PyTorch 2.13, ``python tests/programs/torch_trajectories.py``. The tests use its
constants.
"""

from pathlib import Path

import numpy as np

LR, BETAS, EPS, STEPS, COORDINATES = 0.01, (0.85, 0.95), 1e-3, 60, 12

# name: (class in torch.optim, further arguments)
OPTIMIZERS = {
    "adam": ("Adam", {}),
    "adamax": ("Adamax", {}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "nadam": ("NAdam", {"momentum_decay": 4e-3}),
    "radam": ("RAdam", {}),
    "adamw": ("AdamW", {"weight_decay": 0.1}),
}
FILE = Path(__file__).with_suffix(".npz")


def gradients():
    """Normal gradients; one coordinate is always zero, one zero from the 30th step on, one has a spike."""
    g = np.random.default_rng(7).standard_normal((STEPS, COORDINATES))
    g[:, 0] = 0
    g[30:, 1] = 0
    g[10, 2] = 1e3
    return g


def main():
    import torch

    torch.set_default_dtype(torch.float64)  # else NAdam's product of momenta is float32
    out = {"gradients": gradients(), "torch": np.array(torch.__version__)}
    for name, (cls, kwargs) in OPTIMIZERS.items():
        p = torch.linspace(-1, 1, COORDINATES, dtype=torch.float64).requires_grad_()
        optimizer = getattr(torch.optim, cls)([p], lr=LR, betas=BETAS, eps=EPS, **kwargs)
        path = []
        for g in gradients():
            p.grad = torch.from_numpy(g.copy())
            optimizer.step()
            path.append(p.detach().numpy().copy())
        out[name] = np.array(path)
    np.savez_compressed(FILE, **out)


if __name__ == "__main__":
    main()
