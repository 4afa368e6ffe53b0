"""The optimizers that `benchmarks.train` compares: AdamW with clipping, warmup and cosine decay, as for GPT-2."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jadam
from benchmarks.train.model import Size

WEIGHT_DECAY = 0.1
CLIP = 1.0  # of the gradients' global norm
WARMUP_SHARE = 0.1  # of the steps
REFERENCE = "Optax, float32"
LEAN = "jadam, exact_bf16, int8"
INT8 = "jadam, int8"


class Side(NamedTuple):
    """An optimizer.

    ``stretch`` is the number of steps for which the schedule is made divided by the number of steps that are taken. It
    may be traced, so that one program serves trainings of any length.
    """

    init: Callable  # init(float32 parameters) -> (parameters, state)
    step: Callable  # step(parameters, state, gradients, stretch) -> (parameters, state)
    tx: Any  # transformation for `jadam.plan`, or None


def sides(size: Size, platform: str = "cpu") -> dict[str, Callable[[], Side]]:
    """Return a function for each side that makes it. It raises ImportError if the side's package is not installed."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, size.rate, round(WARMUP_SHARE * size.steps), size.steps)
    rate = lambda stretch: lambda count: schedule(count * stretch)
    adamw: Any = {"b2": size.b2, "weight_decay": WEIGHT_DECAY, "mask": is_decayed}

    def with_optax(dtype):
        def transformation(stretch=1.0):
            return optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate(stretch), **adamw))

        def step(params, state, grads, stretch):
            updates, state = transformation(stretch).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return Side(after_cast(transformation().init, dtype), step, transformation())

    def with_jadam(moments, exact=False):
        def transformation(stretch=1.0):
            tx = jadam.adamw(rate(stretch), moments=moments, **adamw)
            tx = jadam.chain(jadam.clip_by_global_norm(CLIP), tx)
            return jadam.exact_bf16(tx) if exact else tx

        tx = transformation()
        init = (lambda params: jadam.from_float32(params, tx)) if exact else after_cast(tx.init, jnp.float32)
        step = lambda params, state, grads, stretch: jadam.step(transformation(stretch), grads, state, params)
        return Side(init, step, tx)

    def with_flashoptim():
        from flashoptim_jax import flash_adamw

        not_decayed = {"params": lambda path, _: not decays(str(path)), "weight_decay": 0.0}

        def transformation(stretch=1.0):
            options: Any = {"master_weight_bits": None, "fused": platform == "gpu", "param_groups": [not_decayed]}
            return flash_adamw(rate(stretch), b2=size.b2, weight_decay=WEIGHT_DECAY, **options)

        def step(params, state, grads, stretch):
            clip = optax.clip_by_global_norm(CLIP)
            return transformation(stretch).step(params, state, clip.update(grads, clip.init(params))[0])

        return Side(after_cast(transformation().init, jnp.float32), step, None)

    return {
        REFERENCE: lambda: with_optax(jnp.float32),
        LEAN: lambda: with_jadam("int8", exact=True),
        INT8: lambda: with_jadam("int8"),
        "jadam, float32": lambda: with_jadam("float32"),
        "Optax, bf16 weights": lambda: with_optax(jnp.bfloat16),
        "jadam, bfloat16": lambda: with_jadam("bfloat16"),
        "flashoptim-jax, 8-bit": with_flashoptim,
    }


def decays(path: str) -> bool:
    """Whether weight decay applies to a parameter, by its path: to matrices and embeddings only."""
    return "kernel" in path or "embedding" in path


def is_decayed(params):
    """Return the tree of `decays`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(jax.tree_util.keystr(path)), params)


def after_cast(init, dtype):
    """Return the ``init`` of a side that casts the parameters."""

    def cast_and_init(params):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        return params, init(params)

    return cast_and_init
