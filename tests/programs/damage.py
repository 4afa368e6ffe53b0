"""Program of `test_faults.py`: restores damaged checkpoints. A process of its own, as Orbax leaves tasks behind."""

import contextlib
import json
import logging
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import jadam

CONFIGURATIONS = {
    "float32": (jadam.adamw(1e-3), jnp.float32),
    "int8": (jadam.adamw(1e-3, moments="int8"), jnp.float32),
    "exact_bf16": (jadam.exact_bf16(jadam.adamw(1e-3, moments="int8")), jnp.bfloat16),
}


def trained(tx, dtype):
    """Parameters and state after three steps."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((64, 128)), dtype), "bias": jnp.zeros(128, dtype)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def bits(tree):
    """``(dtype, shape, bytes)`` of every array."""
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


def flipped(data, place):
    """``data`` with the ``place``-th bit flipped."""
    byte, bit = divmod(int(place), 8)
    return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]


@contextlib.contextmanager
def changed(file, data):
    """Replaces the contents of ``file``, or removes it for None, within the context."""
    before = file.read_bytes()
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    yield
    file.write_bytes(before)


def outcome(directory, saved):
    """``same`` or ``other`` bits, or who reported the damage: ``Orbax`` or ``checksum``."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            *tree, checksum = checkpointer.restore(directory, saved)
    except Exception:
        return "Orbax"
    if jadam.checksum(tuple(tree)) != checksum:
        return "checksum"
    return "same" if bits(tree) == bits(saved[:-1]) else "other"


def damages(name, flips):
    """Yields ``(file, damage, outcome)`` for every kind of damage to every file of a checkpoint.

    In the largest file, which holds the arrays, ``flips`` bits are flipped, one at a time; in others one bit.
    """
    tree = trained(*CONFIGURATIONS[name])
    saved = (*tree, jadam.checksum(tree))
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "saved"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory, saved)
        data = {file: file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}
        largest = max(data, key=lambda file: len(data[file]))
        rng = np.random.default_rng(0)
        yield None, "none", outcome(directory, saved)
        for file, whole in data.items():
            which = "arrays" if file == largest else str(file.relative_to(directory))
            places = rng.integers(8 * len(whole), size=flips if file == largest else 1)
            attempts = [("deleted", None), ("emptied", b""), ("halved", whole[: len(whole) // 2])]
            for what, contents in [*attempts, *(("flipped", flipped(whole, place)) for place in places)]:
                with changed(file, contents):
                    yield which, what, outcome(directory, saved)
        yield None, "none", outcome(directory, saved)


def main():
    logging.disable(logging.CRITICAL)  # Orbax logs what it raises
    name, flips, result = sys.argv[1:]
    Path(result).write_text(json.dumps(list(damages(name, int(flips)))))


if __name__ == "__main__":
    main()
