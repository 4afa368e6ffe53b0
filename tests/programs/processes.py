"""Program of each process in `test_processes.py`; the test imports its functions, too.

Usage: python tests/programs/processes.py OPTIMIZER FOLDER PORT PROCESS
"""

import functools
import itertools
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam

PROCESSES = 2
DEVICES = 8  # in all processes together
SAVED, LAST = 3, 6  # step of the checkpoint, last step whose state and gradients are recorded
LR = 1e-2
OPTIMIZERS = {
    "float32": (jadam.adamw(LR), jnp.float32),
    "int8, bf16 weights": (jadam.exact_bf16(jadam.adamw(LR, moments="int8")), jnp.bfloat16),
}


def mesh():
    return Mesh(np.array(jax.devices()), ("data",))


def initial(dtype):
    """Parameters. `zero1` divides the hidden kernel along its last axis, others by rows, the bias of 3 not at all."""
    rng = np.random.default_rng(0)
    scaled = lambda *shape: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)
    return {
        "hidden": {"kernel": scaled(33, 256), "bias": np.zeros(256, dtype)},
        "mixed": {"kernel": scaled(256, 64)},
        "out": {"kernel": scaled(64, 3), "bias": np.zeros(3, dtype)},
    }


def batch(mesh, step):
    """Inputs and targets of a step, four rows a device."""
    x = np.random.default_rng(step + 1).standard_normal((4 * DEVICES, 33)).astype(np.float32)
    rows = NamedSharding(mesh, P("data"))
    return [jax.make_array_from_callback(a.shape, rows, a.__getitem__) for a in (x, np.sin(x[:, :3] + x[:, 3:6]))]


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    mixed = jnp.tanh(hidden @ params["mixed"]["kernel"])
    return jnp.mean((mixed @ params["out"]["kernel"] + params["out"]["bias"] - y) ** 2)


@jax.jit
def loss_and_gradients(params, x, y):
    """Loss and gradients in float32, also for bfloat16 parameters."""
    return jax.value_and_grad(loss)(jax.tree.map(lambda p: p.astype(jnp.float32), params), x, y)


def compiled_step(tx, gradients, state, params):
    """`jadam.step` compiled without the gradients, so that both sides of the test run the same program."""
    step = jax.jit(functools.partial(jadam.step, tx), donate_argnums=(1, 2))
    step = step.lower(gradients, state, params).compile()
    assert ("jadam_step" in step.as_text()) == (jadam.backends()["cpu"].kernel is not None)
    return step


def named(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def view(tree, mesh):
    """``{leaf and device: bytes}`` for each device of this process."""
    places = {device: place for place, device in enumerate(mesh.devices.flat)}
    return {
        f"{name} {places[shard.device]}": np.frombuffer(np.asarray(shard.data).tobytes(), np.uint8)
        for name, leaf in named(tree).items()
        for shard in leaf.addressable_shards
    }


def checkpoints(folder):
    """Orbax's checkpoint manager, which has written everything when it is closed."""
    return ocp.CheckpointManager(folder / "checkpoints", item_names=("params", "state"))


def main(name, folder, process):
    tx, dtype = OPTIMIZERS[name]
    everywhere = mesh()
    assert (len(everywhere.local_devices), everywhere.size) == (DEVICES // PROCESSES, DEVICES)
    params = initial(dtype)
    tx = jadam.sharding.zero1(tx, params, everywhere, "data")
    state = tx.init(params)
    params = jax.device_put(params, NamedSharding(everywhere, P()))
    step = None
    for steps in itertools.count():
        if steps == SAVED:
            items = {"params": ocp.args.StandardSave(params), "state": ocp.args.StandardSave(state)}
            with checkpoints(folder) as manager:
                manager.save(steps, args=ocp.args.Composite(**items))
            (folder / f"checksum-{process}").write_text(str(jadam.checksum((params, state))))
        value, gradients = loss_and_gradients(params, *batch(everywhere, steps))
        if SAVED <= steps <= LAST:
            np.savez(folder / f"view-{steps}-{process}.npz", **view((params, state), everywhere))
            if process == 0:
                np.savez(folder / f"gradients-{steps}.npz", loss=value, **named(gradients))
        if steps == LAST:
            (folder / f"ready-{process}").touch()
        step = step or compiled_step(tx, gradients, state, params)
        params, state = step(gradients, state, params)


if __name__ == "__main__":
    name, folder, port, process = sys.argv[1:]
    signal.alarm(120)  # ends the process if the test was killed
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(process), initialization_timeout=60)
    main(name, Path(folder), int(process))
