"""The compiled programs of a training, and their memory as the compiler reports it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jadam
from benchmarks.train import model
from benchmarks.train.model import Size
from benchmarks.train.sides import Side


@functools.cache
def loss_function(size: Size):
    """Return ``loss(params, text, starts)`` of a model of this size."""
    graph, _ = jax.eval_shape(functools.partial(model.create, size))
    return model.loss_function(size, graph)


@functools.cache
def evaluation(size: Size):
    """Return the jitted mean loss ``f(params, text, starts)`` over many batches; ``starts`` has a row for each."""
    loss = loss_function(size)
    return jax.jit(lambda params, text, starts: jax.lax.map(lambda x: loss(params, text, x), starts).mean())


class Programs:
    """The programs of a side, compiled from shapes: nothing is allocated.

    Args:
        side: the optimizer.
        size: the model.
        tokens: the length of the text.
        token_dtype: the dtype of the text.
        sharding: the sharding of all arguments. That of an abstract device compiles for this device.
    """

    def __init__(self, side: Side, size: Size, tokens: int, token_dtype, sharding=None):
        loss = loss_function(size)

        def train(params, state, text, starts, stretch):
            def step(held, starts):
                value, grads = jax.value_and_grad(loss)(held[0], text, starts)
                return side.step(*held, grads, stretch), value

            held, losses = jax.lax.scan(step, (params, state), starts)
            return *held, losses.mean()

        def step(params, state, grads):
            return side.step(params, state, grads, 1.0)

        shaped = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        held = jax.eval_shape(side.init, model.shapes(size))
        params, state = jax.tree.map(lambda x: shaped(x.shape, x.dtype), held)
        text, starts = shaped((tokens,), token_dtype), shaped((size.chunk, size.batch), jnp.int32)
        donated = functools.partial(jax.jit, donate_argnums=(0, 1))
        self.train = donated(train).lower(params, state, text, starts, shaped((), jnp.float32)).compile()
        self.step = donated(step).lower(params, state, params).compile()
        self.facts = describe(self.train, self.step, params, state, side)


def describe(train, step, params, state, side) -> dict[str, Any]:
    """Return the bytes of the arrays, of the compiled programs and of `jadam.plan`; None where they are not known."""
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    whole, alone = train.memory_analysis(), step.memory_analysis()
    facts: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "weights and optimizer, bytes": size((params, state)),
        "training, bytes by the compiler": None,
        "step, arguments": alone and alone.argument_size_in_bytes,
        "step, temporaries": alone and alone.temp_size_in_bytes,
        "plan": None if side.tx is None else jadam.plan(side.tx, params, {"data": 1}, "data").total,
    }
    if whole:
        in_and_out = whole.argument_size_in_bytes + whole.output_size_in_bytes - whole.alias_size_in_bytes
        facts["training, bytes by the compiler"] = in_and_out + whole.temp_size_in_bytes
    return facts
