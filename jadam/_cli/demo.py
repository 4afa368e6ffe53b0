"""``jadam demo``: train a classifier of handwritten digits with three optimizers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import flax.nnx as nnx
import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

from jadam._cli.output import check_picture, save_picture
from jadam._optimizers.adam import adam

if TYPE_CHECKING:
    import matplotlib.figure

BATCH = 64
EVALUATE_EVERY = 10
TEST_SHARE = 0.2


class Digits(NamedTuple):
    """Images, ``[n, 64]`` with values in [0, 1], and labels 0 to 9."""

    images: np.ndarray
    labels: np.ndarray


class Run(NamedTuple):
    """Training curves and cost of one optimizer."""

    name: str
    learning_rate: float
    steps: list[int]  # at which loss and accuracy were measured
    loss: list[float]  # of the batch, in nats per digit
    accuracy: list[float]  # on the test set
    seconds: float  # of training, without compilation and evaluation
    bytes_per_parameter: float


class Classifier(nnx.Module):
    """A network with 64 inputs, 128 hidden units and 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model, optimizer, images, labels):
    """Take one step on a batch; return the loss before it."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def accuracy(model, images, labels):
    """The fraction of digits classified correctly."""
    return (model(images).argmax(-1) == labels).mean()


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


def train(name, learning_rate, tx, init, data, steps, seed, on_progress) -> Run:
    """Train a new model ``init()`` with ``tx``; call ``on_progress(step, loss, test accuracy)`` at each evaluation."""
    training, test = data
    model = init()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    arrays = [x for x in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if x.ndim]
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    run = Run(name, learning_rate, [], [], [], 0.0, sum(x.nbytes for x in arrays) / parameters)

    warmup = init()  # compiles the functions
    train_step(warmup, nnx.Optimizer(warmup, tx, wrt=nnx.Param), *next(batches(training, 1, seed)))
    accuracy(warmup, *test)

    seconds, started = 0.0, time.perf_counter()
    for step, batch in enumerate(batches(training, steps, seed), start=1):
        loss = train_step(model, optimizer, *batch)
        if step % EVALUATE_EVERY == 0 or step == steps:
            run.steps.append(step)
            run.loss.append(float(loss))
            seconds += time.perf_counter() - started
            run.accuracy.append(float(accuracy(model, *test)))
            on_progress(step, run.loss[-1], run.accuracy[-1])
            started = time.perf_counter()
    return run._replace(seconds=seconds)


def table(runs: list[Run]) -> Table:
    """The results as a table with one row per optimizer."""
    result = Table(title="1,797 handwritten digits, 64-128-10 network, same initial weights, same batches")
    for heading in (
        "optimizer",
        "learning rate",
        "test accuracy",
        "steps to 90 %",
        "s per 1,000 steps",
        "state bytes per parameter",
    ):
        result.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for run in runs:
        reached = (step for step, value in zip(run.steps, run.accuracy, strict=True) if value >= 0.9)
        result.add_row(
            run.name,
            f"{run.learning_rate:g}",
            f"{run.accuracy[-1]:.3f}",
            str(next(reached, "not reached")),
            f"{run.seconds / run.steps[-1] * 1000:.2f}",
            f"{run.bytes_per_parameter:.1f}",
        )
    return result


def draw(runs: list[Run]) -> matplotlib.figure.Figure:
    """Plot training loss and test accuracy against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = [("#999999", "-", 1.5), ("#E69F00", "-", 3.5), ("#0072B2", "--", 1.5)]
    for run, (color, line, width) in zip(runs, styles, strict=True):
        style = {
            "color": color,
            "linestyle": line,
            "linewidth": width,
            "label": f"{run.name}, lr {run.learning_rate:g}",
        }
        left.plot(run.steps, run.loss, **style)
        right.plot(run.steps, [100 * a for a in run.accuracy], **style)
    left.set(xlabel="step", ylabel="batch loss (nats per digit)", yscale="log", title="Training loss")
    right.set(xlabel="step", ylabel="accuracy (%)", ylim=(None, 100.5), title="Test accuracy")
    right.axhline(90, color="black", linewidth=0.5)
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(lr: float, sgd_lr: float, steps: int, seed: int, out: Path) -> list[Run]:
    """Train with each optimizer; print a table and save a plot."""
    check_picture(out)
    console = Console()
    data = load(seed)
    init = lambda: Classifier(nnx.Rngs(seed))
    optimizers = [
        ("SGD", sgd_lr, optax.sgd(sgd_lr)),
        ("optax.adam", lr, optax.adam(lr)),
        ("jadam.adam", lr, adam(lr)),
    ]
    columns = [
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    runs = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, rate, tx in optimizers:
            task = progress.add_task(name, total=steps, note="")
            show = lambda step, loss, accuracy, task=task: progress.update(
                task, completed=step, note=f"loss {loss:.4f}, test accuracy {accuracy:.1%}"
            )
            runs.append(train(name, rate, tx, init, data, steps, seed, show))
            if not console.is_terminal:
                console.print(f"{name}: {steps} steps, test accuracy {runs[-1].accuracy[-1]:.1%}")
    console.print(table(runs))
    save_picture(draw(runs), out)
    console.print(f"Plot saved to {out.resolve()}", soft_wrap=True)
    return runs
