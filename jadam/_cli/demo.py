"""A first minute with jadam: three optimizers, one Flax classifier, real handwritten digits."""

import time
from pathlib import Path
from typing import NamedTuple

import flax.nnx as nnx
import jax
import matplotlib
import matplotlib.figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

from jadam._cli.output import check_picture, save_picture
from jadam._optimizers.adam import adam

BATCH = 64
EVALUATE_EVERY = 10
TEST_SHARE = 0.2


class Digits(NamedTuple):
    """Images as rows of 64 pixels in [0, 1], and their digits."""

    images: np.ndarray
    labels: np.ndarray


class Run(NamedTuple):
    """What one optimizer did."""

    name: str
    learning_rate: float
    steps: list[int]  # where the two curves were measured
    loss: list[float]  # of the last batch, nats per digit
    accuracy: list[float]  # on the test set
    seconds: float  # of training, compilation and evaluation left out
    bytes_per_parameter: float


class Classifier(nnx.Module):
    """64 pixels, 128 hidden units, 10 classes."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step on one batch; the loss before it."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


@nnx.jit
def accuracy(model, images, labels):
    """Share of digits recognised."""
    return (model(images).argmax(-1) == labels).mean()


def load(seed: int) -> tuple[Digits, Digits]:
    """Training and test set, split at random."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    n = int(len(labels) * TEST_SHARE)
    return Digits(images[n:], labels[n:]), Digits(images[:n], labels[:n])


def batches(data: Digits, steps: int, seed: int):
    """``steps`` batches, drawn without replacement within an epoch."""
    rng = np.random.default_rng([seed, 1])
    order = np.array([], int)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(data.labels))
        index, order = order[:BATCH], order[BATCH:]
        yield data.images[index], data.labels[index]


def train(name, learning_rate, tx, start, data, steps, seed, on_progress) -> Run:
    """Train a fresh ``start()`` with ``tx``, calling ``on_progress(steps done, loss, test accuracy)`` at times."""
    training, test = data
    model = start()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    arrays = [x for x in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if x.ndim]
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    run = Run(name, learning_rate, [], [], [], 0.0, sum(x.nbytes for x in arrays) / parameters)

    compiled = start()  # a throw-away copy takes the compilation
    train_step(compiled, nnx.Optimizer(compiled, tx, wrt=nnx.Param), *next(batches(training, 1, seed)))
    accuracy(compiled, *test)

    seconds, began = 0.0, time.perf_counter()
    for step, batch in enumerate(batches(training, steps, seed), start=1):
        loss = train_step(model, optimizer, *batch)
        if step % EVALUATE_EVERY == 0 or step == steps:
            run.steps.append(step)
            run.loss.append(float(loss))
            seconds += time.perf_counter() - began
            run.accuracy.append(float(accuracy(model, *test)))
            on_progress(step, run.loss[-1], run.accuracy[-1])
            began = time.perf_counter()
    return run._replace(seconds=seconds)


def table(runs: list[Run]) -> Table:
    """The result, a row per optimizer."""
    result = Table(title="1,797 handwritten digits, 64-128-10 network, same start, same batches")
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
    """Learning curves: training loss and test accuracy against steps."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
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
    left.set(xlabel="step", ylabel="loss of the batch (nats per digit)", yscale="log", title="Training loss")
    right.set(xlabel="step", ylabel="recognised (%)", ylim=(None, 100.5), title="Test digits recognised")
    right.axhline(90, color="black", linewidth=0.5)
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(lr: float, sgd_lr: float, steps: int, seed: int, out: Path) -> list[Run]:
    """Train with each optimizer, print the table, write the picture."""
    check_picture(out)
    console = Console()
    data = load(seed)
    start = lambda: Classifier(nnx.Rngs(seed))
    sides = [
        ("SGD", sgd_lr, optax.sgd(sgd_lr)),
        ("optax.adam", lr, optax.adam(lr)),
        ("jadam.adam", lr, adam(lr)),
    ]
    columns = [TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.fields[note]}"))
    runs = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name, rate, tx in sides:
            task = progress.add_task(name, total=steps, note="")
            show = lambda done, loss, correct, task=task: progress.update(
                task, completed=done, note=f"loss {loss:.4f}, {correct:.1%} of test digits"
            )
            runs.append(train(name, rate, tx, start, data, steps, seed, show))
            if not console.is_terminal:
                console.print(f"{name}: {steps} steps, {runs[-1].accuracy[-1]:.1%} of test digits recognised")
    console.print(table(runs))
    save_picture(draw(runs), out)
    console.print(f"Learning curves: {out.resolve()}", soft_wrap=True)
    return runs
