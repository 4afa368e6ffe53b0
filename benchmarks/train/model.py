"""GPT-2 (Radford et al. 2019) in Flax NNX, its layers in one scan, and the sizes that are trained."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

STANDARD_DEVIATION = 0.02  # of GPT-2's initial weights


class Size(NamedTuple):
    """A model and how it is trained."""

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int
    dtype: Any  # of activations
    batch: int  # sequences of `context` tokens
    steps: int
    quick_steps: int
    rate: float  # the largest of the schedule
    b2: float
    seeds: int  # of the sides that are compared with float32
    chunk: int  # steps in one call
    minutes: float
    quick_minutes: float


SIZES = {
    "gpt2": Size(
        vocabulary=50257,
        context=1024,
        width=768,
        heads=12,
        layers=12,
        dtype=jnp.bfloat16,
        batch=4,
        steps=3000,
        quick_steps=1000,
        rate=3e-4,
        b2=0.95,
        seeds=2,
        chunk=50,
        minutes=10.0,
        quick_minutes=4.0,
    ),
    "tiny": Size(
        vocabulary=256,
        context=64,
        width=64,
        heads=4,
        layers=2,
        dtype=jnp.float32,
        batch=16,
        steps=300,
        quick_steps=150,
        rate=2e-3,
        b2=0.999,
        seeds=3,
        chunk=25,
        minutes=3.0,
        quick_minutes=2.0,
    ),
}


class Block(nnx.Module):
    """Causal attention and a feed-forward network, each with a layer norm before it and a residual connection."""

    def __init__(self, size: Size, param_dtype, rngs: nnx.Rngs):
        width, self.heads = size.width, size.heads
        types: Any = {"dtype": size.dtype, "param_dtype": param_dtype, "rngs": rngs}
        first = nnx.initializers.normal(STANDARD_DEVIATION)
        last = nnx.initializers.normal(STANDARD_DEVIATION / (2 * size.layers) ** 0.5)  # added to the residual stream
        self.ln_1, self.ln_2 = nnx.LayerNorm(width, **types), nnx.LayerNorm(width, **types)
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=first, **types)
        self.attention_out = nnx.Linear(width, width, kernel_init=last, **types)
        self.up = nnx.Linear(width, 4 * width, kernel_init=first, **types)
        self.down = nnx.Linear(4 * width, width, kernel_init=last, **types)

    def __call__(self, x):
        """Map (batch, context, width) to the same shape."""
        heads = lambda x: x.reshape(*x.shape[:-1], self.heads, -1)
        q, k, v = map(heads, jnp.split(self.qkv(self.ln_1(x)), 3, axis=-1))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.ln_2(x))))


class GPT2(nnx.Module):
    """Language model. Its output layer is the transposed embedding."""

    def __init__(self, size: Size, param_dtype, rngs: nnx.Rngs):
        types: Any = {"dtype": size.dtype, "param_dtype": param_dtype, "rngs": rngs}
        normal = nnx.initializers.normal(STANDARD_DEVIATION)
        self.wte = nnx.Embed(size.vocabulary, size.width, embedding_init=normal, **types)
        self.wpe = nnx.Embed(size.context, size.width, embedding_init=normal, **types)
        many = nnx.split_rngs(splits=size.layers)(nnx.vmap(lambda rngs: Block(size, param_dtype, rngs)))
        self.blocks = many(rngs)
        self.ln_f = nnx.LayerNorm(size.width, **types)

    def __call__(self, tokens):
        """Map (batch, context) token numbers to the logits of the next tokens."""
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.wte.attend(self.ln_f(x))


def create(size: Size, seed: int = 0, param_dtype=jnp.float32):
    """Return the model's graph definition and its parameters, a nested dict."""
    graph, params = nnx.split(GPT2(size, param_dtype, nnx.Rngs(seed)), nnx.Param)
    return graph, nnx.to_pure_dict(params)


def shapes(size: Size, param_dtype=jnp.float32):
    """Return the shapes of the parameters."""
    return jax.eval_shape(lambda: create(size, 0, param_dtype)[1])


def loss_function(size: Size, graph):
    """Return ``loss(params, text, starts)``, the mean cross-entropy in nats of the sequences that start there."""

    def loss(params, text, starts):
        window = text[starts[:, None] + jnp.arange(size.context + 1)].astype(jnp.int32)
        logits = nnx.merge(graph, params)(window[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    return loss
