"""Final loss of training with 2 bytes of state or with bf16 weights, relative to float32 (1.00 = same).

Two problems on real data, the same start and batches for every side: the demo's classifier of handwritten digits, and a
character-level transformer on Python's documentation (`pydoc_data.topics`). The training loss is computed in float32
from the weights as stored (bf16 for sides with bf16 weights).
"""

import functools
import importlib.metadata
import math
import pydoc_data.topics
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
from flax import nnx
from rich.progress import Progress

import jadam
from jadam._cli import demo as _demo

SEEDS = (0, 1, 2)
DIGITS_STEPS, RATES = 4000, (1e-3, 1e-4, 1e-5)
TEXT_STEPS, PEAK_RATE = 2000, 2e-3
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 2, 64, 16

# name: (transformation of a learning rate, dtype of the weights)
SIDES = {
    "float32": (jadam.adam, jnp.float32),
    "bfloat16 moments": (functools.partial(jadam.adam, moments="bfloat16"), jnp.float32),
    "int8 moments": (functools.partial(jadam.adam, moments="int8"), jnp.float32),
    "exact_bf16 weights": (lambda rate: jadam.exact_bf16(jadam.adam(rate)), jnp.bfloat16),
    "int8 moments, exact_bf16 weights": (
        lambda rate: jadam.exact_bf16(jadam.adam(rate, moments="int8")),
        jnp.bfloat16,
    ),
    "optax on bf16 weights": (optax.adam, jnp.bfloat16),
}


def flashoptim():
    """The 8-bit Adam of `flashoptim-jax` as an Optax transformation, or None, and its version or why it is missing."""
    try:
        from flashoptim_jax import flash_adam
    except ImportError:
        return None, "not installed"

    def make(rate):
        tx = flash_adam(rate, master_weight_bits=None, fused=False)  # its fused kernels do not run on a CPU

        def update(grads, state, params):
            new, state = tx.step(params, state, grads)
            return jax.tree.map(jnp.subtract, new, params), state

        return optax.GradientTransformation(tx.init, update)

    return make, f"flashoptim-jax {importlib.metadata.version('flashoptim-jax')}, unfused"


def train(tx, dtype, params, loss, batches, tick):
    """Weights after training on ``batches``, an array of indices, and the loss curve."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)

    @jax.jit
    def some_steps(params, state, batches):
        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, state), values = jax.lax.scan(step, (params, state), batches)
        return params, state, values.mean()

    state, curve = tx.init(params), []
    for part in np.array_split(batches, max(1, len(batches) // 100)):
        params, state, value = some_steps(params, state, part)
        curve.append(float(value))
        tick(len(part))
    return params, curve


def wide(params):
    """The weights cast to float32."""
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def digits(steps=DIGITS_STEPS, seed=0):
    """``(params, batches, loss, final_loss)`` of the digits; ``final_loss`` is that of the whole training set."""
    data, _ = _demo.load(seed)
    graph, params = nnx.split(_demo.Classifier(nnx.Rngs(seed), width=128), nnx.Param)
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)

    def loss(params, index):
        logits = nnx.merge(graph, wide(params))(images[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

    batches = np.random.default_rng(seed).integers(len(labels), size=(steps, 64))
    return params, batches, loss, jax.jit(lambda params: loss(params, jnp.arange(len(labels))))


Modules = getattr(nnx, "List", list)  # before Flax 0.12 a plain list


class Block(nnx.Module):
    """Transformer block: causal attention and a two-layer network, each with layer norm before it."""

    def __init__(self, rngs):
        self.norms = Modules([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        """Maps (batch, context, width) to the same shape."""
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Character-level language model."""

    def __init__(self, characters, rngs):
        self.embed, self.place = nnx.Embed(characters, WIDTH, rngs=rngs), nnx.Embed(CONTEXT, WIDTH, rngs=rngs)
        self.blocks = Modules([Block(rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, text):
        """Maps (batch, context) character numbers to logits of the next character."""
        x = self.embed(text) + self.place(jnp.arange(CONTEXT))
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(text))
        return self.head(self.norm(x))


def text(steps=TEXT_STEPS, seed=0):
    """The same for the transformer; ``final_loss`` is that of 2,048 places in the text."""
    characters, codes = np.unique(list("\n".join(pydoc_data.topics.topics.values())), return_inverse=True)
    codes = jnp.asarray(codes, jnp.int32)
    graph, params = nnx.split(Transformer(len(characters), nnx.Rngs(seed)), nnx.Param)

    def loss(params, start):
        window = codes[start[:, None] + jnp.arange(CONTEXT + 1)]
        logits = nnx.merge(graph, wide(params))(window[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()

    rng = np.random.default_rng(seed)
    batches = rng.integers(len(codes) - CONTEXT, size=(steps, BATCH))
    places = jnp.asarray(rng.integers(len(codes) - CONTEXT, size=(32, 64)))
    return params, batches, loss, jax.jit(lambda params: jax.lax.map(lambda x: loss(params, x), places).mean())


def compare(problem, rate, sides, tick=lambda steps: None):
    """Final loss and loss curve of every side."""
    params, batches, loss, final = problem
    result = {}
    for name, (make, dtype) in sides.items():
        trained, curve = train(make(rate), dtype, params, loss, batches, tick)
        result[name] = {"loss": float(final(trained)), "curve": [float(f"{x:.4g}") for x in curve]}
    return result


def run(options):
    """Trains both problems; returns the results and draws a picture."""
    make, flash = flashoptim()
    sides = SIDES | ({"flashoptim-jax": (make, jnp.float32)} if make else {})
    few = {name: sides[name] for name in sides if name != "exact_bf16 weights"}
    total = len(SEEDS) * (DIGITS_STEPS * len(RATES) * len(sides) + TEXT_STEPS * len(few))
    table = []
    with Progress() as progress:
        task = progress.add_task("lean", total=total)
        tick = lambda steps: progress.advance(task, steps)
        for rate in RATES:
            runs = [compare(digits(seed=seed), rate, sides, tick) for seed in SEEDS]
            table += rows("digits", rate, runs)
        schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, 100, TEXT_STEPS)
        runs = [compare(text(seed=seed), schedule, few, tick) for seed in SEEDS]
        table += rows("text", PEAK_RATE, runs)
    plot(table, Path(__file__).parent / "results" / "lean.png")
    parameters = sum(x.size for x in jax.tree.leaves(text(1)[0]))
    return {"transformer_parameters": parameters, "flashoptim-jax": flash, "rows": table}


def rows(problem, rate, runs):
    """One row a side: losses by seed, their ratios to float32, the mean ratio, and the loss curve."""
    out = []
    for name in runs[0]:
        losses = [run[name]["loss"] for run in runs]
        ratios = [loss / run["float32"]["loss"] for loss, run in zip(losses, runs, strict=True)]
        curve = np.mean([run[name]["curve"] for run in runs], axis=0)
        out.append(
            {
                "problem": problem,
                "rate": rate,
                "side": name,
                "losses": losses,
                "over_float32": ratios,
                "mean_over_float32": float(np.mean(ratios)) if all(map(math.isfinite, ratios)) else None,
                "curve": [float(f"{x:.4g}") for x in curve],
            }
        )
        print(f"{problem} {rate:g} {name}: {losses} {ratios}", flush=True)
    return out


def plot(table, out):
    """Draws the loss curves, means over seeds, one panel for each problem and rate."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # Okabe & Ito's colour-blind palette; float32 is a broad line, as the others lie on it
    styles = [("#999999", "-", 5), ("#0072b2", "-", 1), ("#56b4e9", "--", 1), ("#009e73", ":", 2)]
    styles += [("#000000", "-.", 1), ("#d55e00", "-", 2), ("#e69f00", "--", 1.5)]
    styles = dict(zip(dict.fromkeys(row["side"] for row in table), styles, strict=True))
    panels = sorted({(row["problem"], -row["rate"]) for row in table})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 4.2), layout="constrained")
    for axis, (problem, rate) in zip(axes, panels, strict=True):
        for row in table:
            if (row["problem"], -row["rate"]) == (problem, rate):
                color, line, width = styles[row["side"]]
                steps = 100 * np.arange(1, 1 + len(row["curve"]))
                axis.plot(steps, row["curve"], line, label=row["side"], color=color, lw=width)
        axis.set(
            title=f"{problem}, learning rate {-rate:g}", xlabel="step", ylabel="training loss (nats)", yscale="log"
        )
        axis.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.yaxis.set_minor_formatter(matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
