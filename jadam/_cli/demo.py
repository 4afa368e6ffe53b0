"""``jadam demo``: train on float32 and bf16 weights with Optax and jadam; measure the memory and time of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

import jadam
import jadam.flax
from jadam._cli.output import check_picture, save_picture

if TYPE_CHECKING:
    import matplotlib.figure

WIDTH = 512  # both weight matrices then have the 4,096 elements that int8 needs
BATCH = 64
EVALUATE_EVERY = 20
TEST_SHARE = 0.2
TIMED_SHAPE = (2**11, 2**11)
TIMED_ROUNDS, WARMUP_ROUNDS = 40, 3
STALL, FOLLOW = 5.0, 0.05  # final loss relative to float32's: at least so many times; at most so far from it


class Digits(NamedTuple):
    """Images, ``[n, 64]`` with values in [0, 1], and labels 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


class Side(NamedTuple):
    """One of the sides that are compared."""

    weights: str
    optimizer: str
    dtype: Any  # of the weights
    tx: optax.GradientTransformation
    nnx_optimizer: type[nnx.Optimizer]
    step: Callable  # ``step(tx, grads, state, params)`` returns ``(params, state)``

    @property
    def name(self) -> str:
        """For labels."""
        return f"{self.weights}, {self.optimizer}"


class Run(NamedTuple):
    """Results of one side."""

    side: Side
    steps: list[int]  # after which the loss was measured
    loss: list[float]  # over the training set, in nats per digit
    accuracy: float  # on the test set, at the end
    weight_bytes: float  # per parameter
    state_bytes: float  # per parameter
    milliseconds: float = float("nan")  # per step at TIMED_SHAPE

    @property
    def bytes(self) -> float:
        """Bytes per parameter of weights and optimizer state."""
        return self.weight_bytes + self.state_bytes


class Classifier(nnx.Module):
    """A network with 64 inputs, ``width`` hidden units and 10 classes. It computes in the images' float32."""

    def __init__(self, rngs: nnx.Rngs, width: int = WIDTH):
        self.hidden = nnx.Linear(64, width, rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def update_and_apply(tx, grads, state, params):
    """A step with Optax, with the arguments and results of `jadam.step`."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def make_sides(lr: float) -> list[Side]:
    """The three sides, float32 first."""
    lean = jadam.exact_bf16(jadam.adam(lr, moments="int8"))
    return [
        Side("float32", "optax.adam", jnp.float32, optax.adam(lr), nnx.Optimizer, update_and_apply),
        Side("bf16", "optax.adam", jnp.bfloat16, optax.adam(lr), nnx.Optimizer, update_and_apply),
        Side("bf16", "jadam (int8)", jnp.bfloat16, lean, jadam.flax.Optimizer, jadam.step),
    ]


def cross_entropy(model, images, labels):
    """The mean loss in nats per digit."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model, optimizer, images, labels):
    """Take one step on a batch."""
    optimizer.update(model, nnx.grad(cross_entropy)(model, images, labels))


@nnx.jit
def evaluate(model, images, labels):
    """The loss, and the fraction of digits classified correctly."""
    return cross_entropy(model, images, labels), (model(images).argmax(-1) == labels).mean()


def load(seed: int) -> tuple[Digits, Digits]:
    """The training and test set, split at random."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    n = int(len(labels) * TEST_SHARE)
    return Digits(images[n:], labels[n:]), Digits(images[:n], labels[:n])


def batches(data: Digits, steps: int, seed: int):
    """Yield ``steps`` batches, drawn without replacement within an epoch."""
    rng = np.random.default_rng([seed, 1])
    order = np.array([], int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(data.labels))
        index, order = order[:BATCH], order[BATCH:]
        yield data.images[index], data.labels[index]


def make_model(side: Side, seed: int) -> Classifier:
    """The model at the start. All sides have the same weights, rounded to their dtype."""
    model = Classifier(nnx.Rngs(seed))
    nnx.update(model, optax.tree.cast(nnx.state(model, nnx.Param), side.dtype))
    return model


def train(side: Side, data: tuple[Digits, Digits], steps: int, seed: int, on_progress) -> Run:
    """Train a new model; call ``on_progress(step, loss)`` at each evaluation."""
    training, test = data
    model = make_model(side, seed)
    optimizer = side.nnx_optimizer(model, side.tx, wrt=nnx.Param)
    params, state = nnx.state(model, nnx.Param), nnx.state(optimizer, nnx.optimizer.OptState)
    number = sum(x.size for x in jax.tree.leaves(params))
    weight_bytes, state_bytes = (sum(x.nbytes for x in jax.tree.leaves(tree)) / number for tree in (params, state))

    train_on = nnx.cached_partial(train_step, model, optimizer)  # less overhead per step
    taken, losses = [0], [float(evaluate(model, *training)[0])]
    for step, batch in enumerate(batches(training, steps, seed), start=1):
        train_on(*batch)
        if step % EVALUATE_EVERY == 0 or step == steps:
            taken.append(step)
            losses.append(float(evaluate(model, *training)[0]))
            on_progress(step, losses[-1])
    return Run(side, taken, losses, float(evaluate(model, *test)[1]), weight_bytes, state_bytes)


def make_timer(side: Side) -> Callable[[], float]:
    """A function that takes one step of a large matrix, in place, and returns the milliseconds."""
    step = jax.jit(lambda params, state, grads: side.step(side.tx, grads, state, params), donate_argnums=(0, 1))
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(TIMED_SHAPE, np.float32), side.dtype)
    params = jnp.zeros_like(grads)
    held = [params, side.tx.init(params)]

    def timer() -> float:
        start = time.perf_counter()
        held[:] = jax.block_until_ready(step(*held, grads))
        return 1e3 * (time.perf_counter() - start)

    return timer


def measure(sides: list[Side], on_progress) -> list[float]:
    """The median milliseconds per step of each side. The sides take turns; ``on_progress()`` is called each round."""
    timers = [make_timer(side) for side in sides]
    rounds = []
    for _ in range(WARMUP_ROUNDS + TIMED_ROUNDS):
        rounds.append([timer() for timer in timers])
        on_progress()
    return [statistics.median(times) for times in zip(*rounds[WARMUP_ROUNDS:], strict=True)]


def relative_losses(runs: list[Run]) -> list[float]:
    """The final losses relative to that of the first run, float32's."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a loss may be 0
        return [float(np.divide(run.loss[-1], runs[0].loss[-1])) for run in runs]


def headline(runs: list[Run]) -> str:
    """The title of the plot. It claims only what the losses show."""
    _, stalled, followed = relative_losses(runs)
    if stalled >= STALL and abs(followed - 1) <= FOLLOW:
        return "bf16 weights with Optax stall; with jadam they follow float32"
    return "Adam on float32 and bf16 weights, with Optax and jadam"


def conclusion(runs: list[Run]) -> str:
    """The results in one sentence."""
    _, optax_loss, jadam_loss = map(short, relative_losses(runs))
    first, last = runs[0], runs[-1]
    return (
        f"The final loss on bf16 weights is {optax_loss} times float32's with optax.adam and {jadam_loss} times with "
        f"jadam, which takes {short(last.bytes)} instead of {short(first.bytes)} bytes per parameter and "
        f"{short(last.milliseconds)} instead of {short(first.milliseconds)} ms per step."
    )


def short(x: float) -> str:
    """Three significant digits."""
    return f"{x:#.3g}".rstrip(".")


def table(runs: list[Run]) -> Table:
    """The results as a table with one row per side, at most 60 columns wide."""
    result = Table(
        title=f"{runs[0].steps[-1]:,} steps on handwritten digits",
        caption=f"jadam (int8): {runs[-1].side.tx!r}. bytes/param: weights and optimizer state, without gradients. "
        f"ms/step: the optimizer alone, {np.prod(TIMED_SHAPE):,} parameters on {jax.default_backend()}.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("weights", "optimizer", "final\nloss", "test\nacc.", "bytes/\nparam", "ms/\nstep"):
        is_name = heading in ("weights", "optimizer")
        result.add_column(heading, justify="left" if is_name else "right", overflow="fold")
    for run in runs:
        numbers = f"{run.loss[-1]:#.4g}", f"{run.accuracy:.3f}", f"{run.bytes:.2f}", short(run.milliseconds)
        result.add_row(run.side.weights, run.side.optimizer, *numbers)
    return result


def draw(runs: list[Run]) -> matplotlib.figure.Figure:
    """Plot training loss against steps, bytes per parameter and milliseconds per step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "bytes"], ["loss", "time"]], width_ratios=(1.15, 1))
    loss, memory, timing = (axes[x] for x in ("loss", "bytes", "time"))
    figure.suptitle(headline(runs), fontsize=13, fontweight="bold")
    styles = [("#E69F00", "-", 5), ("#000000", ":", 2.5), ("#0072B2", "--", 2)]  # Okabe & Ito's colors
    for y, (run, (color, line, width)) in enumerate(zip(runs, styles, strict=True)):
        label = f"{run.side.name}: {short(run.loss[-1])}"
        loss.plot(run.steps, run.loss, color=color, linestyle=line, linewidth=width, label=label)
        memory.barh(y, run.weight_bytes, color=color)
        memory.barh(y, run.state_bytes, left=run.weight_bytes, color=color, alpha=0.5)
        memory.text(run.bytes, y, f" {run.weight_bytes:.0f} + {run.state_bytes:.1f}", va="center")
        timing.barh(y, run.milliseconds, color=color)
        timing.text(run.milliseconds, y, f" {short(run.milliseconds)}", va="center")
    loss.set(xlabel="step", ylabel="training loss (nats per digit)", yscale="log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_locator(NullLocator())
    loss.legend(title="final loss", fontsize=9, title_fontsize=9)
    loss.grid(alpha=0.3)
    for x, part in ((0, "weights"), (runs[0].weight_bytes, "optimizer state")):
        memory.text(x, 0, f" {part}", va="center", fontsize=9)
    memory.set_title("Bytes per parameter, without gradients", fontsize=10)
    where = jax.default_backend().upper()
    timing.set_title(f"ms per step, {np.prod(TIMED_SHAPE):,} parameters, {where}", fontsize=10)
    for bars in (memory, timing):
        bars.set(yticks=range(len(runs)), yticklabels=[run.side.name for run in runs], xticks=[])
        bars.invert_yaxis()
        bars.margins(x=0.3)
    for each in (loss, memory, timing):
        each.spines[["top", "right"]].set_visible(False)
    return figure


def run(lr: float, steps: int, seed: int, out: Path) -> list[Run]:
    """Train and measure each side; print a table and save a plot."""
    check_picture(out)
    console = Console()
    data, sides, runs = load(seed), make_sides(lr), []
    columns = [TextColumn("{task.description:<19}"), BarColumn(bar_width=10), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for side in sides:
            task = progress.add_task(side.name, total=steps, note="")
            show = lambda step, loss, task=task: progress.update(task, completed=step, note=f"loss {loss:.4f}")
            runs.append(train(side, data, steps, seed, show))
            if not console.is_terminal:
                console.print(f"{side.name}: {steps} steps, loss {runs[-1].loss[-1]:.4f}")
        task = progress.add_task("time of a step", total=WARMUP_ROUNDS + TIMED_ROUNDS, note="")
        times = measure(sides, lambda: progress.advance(task))
        runs = [run._replace(milliseconds=x) for run, x in zip(runs, times, strict=True)]
    console.print(table(runs))
    console.print(conclusion(runs))
    save_picture(draw(runs), out)
    console.print(f"Plot saved to {out.resolve()}", soft_wrap=True)
    return runs
