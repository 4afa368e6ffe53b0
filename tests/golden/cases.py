"""The optimizers and problems whose trajectories are in ``tests/golden``.

Uses only public names, so that internal changes of jadam do not touch this file.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from family import FAMILY, VARIANTS
from helpers import INT8_OPTIMIZERS

import jadam

STEPS = 20
SHAPES = {  # "k" is stored in int8: its rows have one full and one partial block
    "small": {"w": (3, 5), "b": (7,), "s": ()},
    "medium": {"w": (16, 20), "b": (7,), "s": ()},
    "large": {"k": (24, 172), "b": (7,)},
}
KEPT = {"small": range(1, STEPS + 1), "medium": (1, 9, 10, 19, 20), "large": (1, 9, 10, 19, 20)}
RATE = optax.cosine_decay_schedule(1e-2, 40)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, the size of the problem, and the dtypes of parameters and gradients."""

    make: Callable
    size: str = "small"
    params: type = jnp.float32
    grads: type = jnp.float32


def _cases():
    for member in FAMILY:
        yield f"{member.name}, float32", Case(functools.partial(member.make, RATE, **member.settings))
        yield f"{member.name}, bfloat16", Case(functools.partial(member.make, RATE, moments="bfloat16"), "medium")
    for name in INT8_OPTIMIZERS:
        yield f"{name}, int8", Case(functools.partial(getattr(jadam, name), RATE, moments="int8"), "large")
    for name, settings, _ in VARIANTS:
        text = ", ".join(f"{key}={value}" for key, value in settings.items() if key not in ("b1", "b2", "eps"))
        yield f"{name}, {text or 'b2=0.5'}", Case(functools.partial(getattr(jadam, name), RATE, **settings))
    b1, b2 = (lambda t: 0.9 - 0.5 / (t + 1.0)), (lambda t: 0.99 - 0.3 / (t + 2.0))
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    frozen, half, others = ("b", jadam.FROZEN), ("s", {"lr_mult": 0.5, "b1": 0.8}), ("", {"weight_decay": 0.1})
    more = {
        "scale_by_adam": Case(jadam.scale_by_adam),
        "adam, mu_dtype": Case(lambda: jadam.adam(RATE, mu_dtype=jnp.bfloat16)),
        "adam, scheduled betas": Case(lambda: jadam.adam(RATE, b1, b2)),
        "adam, complex": Case(lambda: jadam.adam(RATE), params=jnp.complex64, grads=jnp.complex64),
        "adam, bfloat16 parameters": Case(lambda: jadam.adam(RATE), params=jnp.bfloat16),
        "adamw, mask": Case(lambda: jadam.adamw(RATE, weight_decay=0.1, mask=matrices)),
        "adamw, max_lr": Case(lambda: jadam.adamw(RATE, weight_decay=1e-3, max_lr=1e-2)),
        "adamw, bfloat16 gradients": Case(lambda: jadam.adamw(RATE), grads=jnp.bfloat16),
        "nadam, momentum_decay": Case(lambda: jadam.nadam(RATE, momentum_decay=4e-3)),
        "chain, clip": Case(lambda: jadam.chain(jadam.clip(0.1), jadam.adam(RATE))),
        "chain, clip_by_global_norm": Case(lambda: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(RATE))),
        "by_path": Case(lambda: jadam.by_path([frozen, half, others], RATE)),
        "by_path, int8": Case(lambda: jadam.by_path([frozen, others], RATE, moments="int8"), "large"),
        "average_params": Case(lambda: optax.chain(jadam.adam(RATE), jadam.average_params(0.9))),
    }
    yield from more.items()
    bf16 = {"params": jnp.bfloat16, "grads": jnp.bfloat16}
    for moments, size in (("float32", "small"), ("bfloat16", "medium"), ("int8", "large")):
        make = functools.partial(lambda moments: jadam.exact_bf16(jadam.adamw(RATE, moments=moments)), moments)
        yield f"exact_bf16, {moments}", Case(make, size, **bf16)
    clipped = lambda: jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(RATE, moments="int8")))
    yield "exact_bf16, chain, int8", Case(clipped, "large", **bf16)


CASES = dict(_cases())


def inputs(case: Case, stored) -> tuple:
    """Parameters, and gradients stacked over steps, in the dtypes of the case."""

    def cast(name, dtype):
        x = stored[name]
        if dtype == jnp.complex64:
            x = x + 1j * np.roll(x, 1, axis=-1) if x.ndim else x + 0j
        return jnp.asarray(x).astype(dtype)

    shapes = SHAPES[case.size]
    params = {name: cast(f"params/{case.size}/{name}", case.params) for name in shapes}
    gradients = {name: cast(f"gradients/{case.size}/{name}", case.grads) for name in shapes}
    return params, gradients


def trajectory(case: Case, stored) -> dict[int, tuple]:
    """``{step: (params, state)}`` for the steps in `KEPT`, with jitted `jadam.step`."""
    params, gradients = inputs(case, stored)
    tx = case.make()
    step = jax.jit(lambda g, state, params: jadam.step(tx, g, state, params))
    state, kept = tx.init(params), {}
    for t in range(STEPS):
        params, state = step(jax.tree.map(lambda g, t=t: g[t], gradients), state, params)
        if t + 1 in KEPT[case.size]:
            kept[t + 1] = params, state
    return kept


def to_arrays(name: str, kept: dict[int, tuple]) -> dict[str, np.ndarray]:
    """Trajectory as named NumPy arrays, each leaf stacked over steps; bfloat16 as uint16 bits."""
    stacked = jax.tree.map(lambda *x: np.stack([np.asarray(y) for y in x]), *kept.values())
    bits = [x.view(np.uint16) if x.dtype == jnp.bfloat16 else x for x in jax.tree.leaves(stacked)]
    return {f"{name}/{i}": x for i, x in enumerate(bits)}


def from_arrays(name: str, case: Case, stored) -> dict[int, tuple]:
    """Inverse of `to_arrays`."""
    params, _ = inputs(case, stored)
    like = (params, jax.eval_shape(case.make().init, params))
    leaves, structure = jax.tree.flatten(like)
    columns = [stored[f"{name}/{i}"].view(x.dtype) for i, x in enumerate(leaves)]
    return {t: structure.unflatten([x[i] for x in columns]) for i, t in enumerate(KEPT[case.size])}
