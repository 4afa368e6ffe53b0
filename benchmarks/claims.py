"""Six claims of the paper about Adam, tested on real data, each with a verdict by a fixed rule.

Each optimizer has its own grid of learning rates, a quarter of a decade apart (half a decade for the network of 1,000
units), which grows until its ends are clearly worse than its best. Nesterov's momentum and RMSProp's decay are tuned,
too; Adam keeps the paper's betas. All optimizers have the same start, batches and noise for each seed. For logistic
regression the schedule is tuned as well: constant, or the paper's alpha / sqrt(t), which alone would be unfair to
AdaGrad, whose rate decays by itself. The problems are in `benchmarks.training`. An interrupted run resumes.
"""

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
from PIL import Image
from rich.progress import Progress

import jadam
from benchmarks import training

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1.01  # losses within 1 %, or not ordered the same way for every seed, count as equal
WITHIN = 1.05  # a learning rate is good if its loss is within 5 % of the best

HOLDS, PARTLY, FAILS = "holds", "holds in part", "does not hold on this data"

# {optimizer: {variant: (function of a learning rate or schedule, log10 of a usual rate)}}
SIDES = {
    "Adam": {"": (jadam.adam, -2.5)},
    "SGD": {"": (optax.sgd, 0.0)},
    "SGD, Nesterov": {
        f"momentum {momentum}": (functools.partial(optax.sgd, momentum=momentum, nesterov=True), usual)
        for momentum, usual in ((0.9, -1.0), (0.99, -2.0))
    },
    # the accumulator starts at 0 as in Duchi et al. 2011; Optax's 0.1 would dominate sparse gradients
    "AdaGrad": {"": (functools.partial(optax.adagrad, initial_accumulator_value=0.0), -1.5)},
    "RMSProp": {f"decay {decay}": (functools.partial(optax.rmsprop, decay=decay), -2.5) for decay in (0.9, 0.99)},
}


class Sizes(NamedTuple):
    """Sizes of a run."""

    sides: dict = SIDES
    seeds: int = 3
    grid: int = 17  # learning rates before the grid grows
    largest_grid: int = 41
    steps: int = 1000
    network: tuple[int, ...] = (64,)
    network_steps: int = 600
    wide: tuple[int, ...] = (1000, 1000)
    wide_steps: int = 500
    code: tuple[int, int] = (100, 10)
    code_steps: int = 800
    code_rates: int = 9
    betas: tuple = tuple((b1, b2) for b1 in (0.0, 0.9) for b2 in (0.99, 0.999, 0.9999))
    evaluated: int = 2000
    points: int = 20  # points of a loss curve


QUICK = Sizes(
    sides={side: SIDES[side] for side in ("Adam", "SGD")},
    seeds=2,
    grid=3,
    largest_grid=3,
    steps=10,
    network=(4,),
    network_steps=10,
    wide=(8, 8),
    wide_steps=10,
    code=(4, 2),
    code_steps=10,
    code_rates=3,
    betas=((0.9, 0.999),),
    evaluated=50,
    points=5,
)


# Schedules: functions of the peak learning rate and the number of steps; they return a rate or a schedule.
def constant(rate, steps):
    return rate


def root_decay(rate, steps):
    """The paper's alpha / sqrt(t)."""
    return lambda count: rate / jnp.sqrt(count + 1.0)


def one_cycle(rate, steps):
    """Cosine one-cycle: up for 30 % of the steps, then down to nearly 0."""
    shape = optax.cosine_onecycle_schedule(steps, 1.0)
    return lambda count: rate * shape(count)


class Task(NamedTuple):
    """A problem, and settings that all optimizers share."""

    problem: Callable
    schedules: dict[str, Callable]  # tuned, like the rate
    steps: int
    step: float = 0.25  # spacing of the grid, decades
    fully: bool = True  # run every rate with every seed, and grow the grid until its ends are no good rates


def tasks(sizes: Sizes) -> dict[str, Task]:
    """``{name: task}``; a problem is loaded when it is called."""
    network = functools.partial(training.network, sizes.network)
    # dropout keeps the loss away from 0, where 5 % mean nothing
    dropping = functools.partial(network, dropout=0.5)
    flat, either = {"": constant}, {"constant": constant, "1/sqrt(t)": root_decay}
    return {
        "mnist_logistic": Task(training.network, either, sizes.steps),
        "reviews": Task(training.bag_of_words, either, sizes.steps),
        "mnist_network": Task(dropping, flat, sizes.network_steps),
        "mnist_one_cycle": Task(dropping, {"": one_cycle}, sizes.network_steps),
        "mnist_wrong_labels": Task(functools.partial(network, noise=0.4), flat, sizes.network_steps),
        "mnist_wide_network": Task(
            functools.partial(training.network, sizes.wide, dropout=0.5), flat, sizes.wide_steps, 0.5, False
        ),
    }


def short(x):
    """Rounds all numbers of a tree to four digits; None for non-finite ones."""
    if isinstance(x, dict):
        return {key: short(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [short(value) for value in x]
    if isinstance(x, float | np.floating | np.ndarray | jax.Array):
        x = np.asarray(x)
        return short(x.tolist()) if x.ndim else float(f"{x:.4g}") if np.isfinite(x) else None
    return x


def finite_or_inf(losses):
    """float64 array with NaN replaced by infinity."""
    return np.nan_to_num(np.asarray(losses, np.float64), nan=np.inf, posinf=np.inf)


def sweep(train, usual, step, grid, largest, seeds, within=WITHIN):
    """``(log10_rates, losses, errors)`` of a grid around ``usual``, which grows while an end is a good rate.

    ``train`` is a result of `training.trainer`. Losses have shape (seeds, rates, points), errors (seeds, rates).
    """
    run = lambda exponents: map(finite_or_inf, train(jnp.asarray(10.0 ** np.asarray(exponents), jnp.float32), seeds))
    exponents = usual + step * (np.arange(grid) - grid // 2)
    losses, errors = run(exponents)
    while len(exponents) < largest:
        final = losses[..., -1].mean(0)
        low, high = (final[i] <= within * final.min() for i in (0, -1))
        if not (low or high):
            break
        more = exponents[0] - step * np.arange(1, 3)[::-1] if low else exponents[-1] + step * np.arange(1, 3)
        more_losses, more_errors = run(more)
        pair = lambda old, new: np.concatenate([new, old] if low else [old, new], axis=1)  # noqa: B023 -- used at once
        losses, errors = pair(losses, more_losses), pair(errors, more_errors)
        exponents = np.concatenate([more, exponents] if low else [exponents, more])
    return exponents, losses, errors


def good_rates(exponents, final, within=WITHIN):
    """log10 of the ends of the interval of good rates around the best one, by linear interpolation of the loss."""
    exponents, final = np.asarray(exponents), np.asarray(final)
    best, bound = int(np.argmin(final)), within * final.min()

    def end(direction):
        i = best
        while 0 <= i + direction < len(final) and final[i + direction] <= bound:
            i += direction
        if not 0 <= i + direction < len(final):
            return exponents[i]
        rise = final[i + direction] - final[i]
        share = (bound - final[i]) / rise if np.isfinite(rise) else 0.0
        return exponents[i] + share * (exponents[i + direction] - exponents[i])

    return float(end(-1)), float(end(1))


def measure(task: Task, sizes: Sizes, tick=lambda: None) -> dict:
    """Result of each optimizer at its best rate, and its final loss over learning rates."""
    problem, seeds, result = task.problem(), jnp.arange(sizes.seeds), {}
    for side, variants in sizes.sides.items():
        found = {}
        for (kind, (make, usual)), (schedule, of) in itertools.product(variants.items(), task.schedules.items()):
            variant = ", ".join(filter(None, (kind, schedule)))
            tx = lambda rate, make=make, of=of: make(of(rate, task.steps))
            train = training.trainer(problem, tx, task.steps, sizes.points, evaluated=sizes.evaluated)
            if task.fully:
                exponents, losses, errors = sweep(train, usual, task.step, sizes.grid, sizes.largest_grid, seeds)
            else:  # stop when the best rate is not an end
                exponents, losses, errors = sweep(train, usual, task.step, 3, sizes.largest_grid, seeds[:1], 1.0)
            found[variant] = exponents, losses, errors, train
            tick()
        final = {variant: losses[..., -1].mean(0) for variant, (_, losses, _, _) in found.items()}
        variant = min(final, key=lambda variant: final[variant].min())
        exponents, losses, errors, train = found[variant]
        best = int(np.argmin(final[variant]))
        low, high = good_rates(exponents, final[variant])
        grid = {"log10_rate": exponents, "loss": final[variant]}
        if task.fully:
            spread = losses[..., -1]
            grid |= {"low": spread.min(0), "high": spread.max(0)}
            losses, errors = losses[:, best], errors[:, best]
        else:
            rate = jnp.asarray([10.0 ** exponents[best]], jnp.float32)
            losses, errors = (finite_or_inf(x)[:, 0] for x in train(rate, seeds))
        result[side] = {
            "variant": variant,
            "log10_rate": exponents[best],
            "loss": losses[:, -1],
            "test_error": errors,
            "curves": losses,
            "good_log10_rates": [low, high],
            "width": high - low if task.fully else None,
            "grid": grid,
            "other_variants": {name: {"loss": final[name].min()} for name in final if name != variant},
        }
    return {"steps": task.steps, "sides": short(result)}


def rescaling(params):
    """A random power of two from 1/256 to 256 for every weight."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.exp2(rng.integers(-8, 9, x.shape).astype(np.float32)), params)


def times(factors):
    """Transformation that multiplies gradients by ``factors``."""
    return optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, factors))


UNSCALED = {"Adam": lambda rate: jadam.adam(rate, eps=0.0), "SGD": optax.sgd}


def weights_that_differ(make, steps, rate=0.01) -> dict[str, int]:
    """Number of weights of a logistic regression, and of those whose bits change if gradients are rescaled."""
    problem = training.network()
    start = problem.init(jax.random.key(0))

    @jax.jit  # factors are an argument, so that both trainings run the same program
    def final(factors):
        tx = optax.chain(times(factors), make(rate))

        def step(carry, t):
            params, state = carry
            rows = jax.random.randint(jax.random.fold_in(jax.random.key(0), t), (128,), 0, problem.rows)
            updates, state = tx.update(jax.grad(problem.loss)(params, rows, None), state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jax.lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[0][0]
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)]).view(jnp.uint32)

    plain, rescaled = final(jax.tree.map(jnp.ones_like, start)), final(rescaling(start))
    return {"weights": plain.size, "weights_that_differ": int((plain != rescaled).sum())}


def invariance(sizes: Sizes, tick=lambda: None) -> dict:
    """Adam (eps 0) and SGD on logistic regression, plain and with every gradient scaled by a power of two."""
    problem = training.network()
    factors = rescaling(problem.init(jax.random.key(0)))
    seeds, exponents = jnp.arange(sizes.seeds), np.arange(-3.0, 2.01, 0.25)
    rates, result = jnp.asarray(10.0**exponents, jnp.float32), {}
    for side, make in UNSCALED.items():
        result[side] = weights_that_differ(make, sizes.steps)
        for name, tx in (
            ("plain", make),
            ("rescaled", lambda rate, make=make: optax.chain(times(factors), make(rate))),
        ):
            train = training.trainer(problem, tx, sizes.steps, sizes.points, evaluated=sizes.evaluated)
            losses = finite_or_inf(train(rates, seeds)[0])
            best = int(np.argmin(losses[..., -1].mean(0)))
            result[side][name] = {
                "log10_rate": exponents[best],
                "loss": losses[:, best, -1],
                "curves": losses[:, best],
                "grid": {"log10_rate": exponents, "loss": losses[..., -1].mean(0)},
            }
            tick()
    return {"log2_factors": [-8, 8], "steps": sizes.steps, "sides": short(result)}


def bias_correction(sizes: Sizes, tick=lambda: None) -> dict:
    """Figure 4 of the paper: a variational autoencoder with and without bias correction, after few and more steps."""
    problem, seeds = training.autoencoder(*sizes.code), jnp.arange(sizes.seeds)
    exponents = np.linspace(-5, -1, sizes.code_rates)
    rates, cells = jnp.asarray(10.0**exponents, jnp.float32), []
    for b1, b2 in sizes.betas:
        cell = {"b1": b1, "b2": b2}
        for name, switch in (("with", True), ("without", False)):
            make = functools.partial(jadam.adam, b1=b1, b2=b2, bias_correction=switch)
            train = training.trainer(problem, make, sizes.code_steps, 5, batch=64, evaluated=sizes.evaluated)
            losses = finite_or_inf(train(rates, seeds)[0])
            cell[name] = {"few": losses[..., 0], "more": losses[..., -1]}  # (seed, rate)
            tick()
        cells.append(cell)
    steps = {"few": sizes.code_steps // 5, "more": sizes.code_steps}
    return short({"steps": steps, "log10_rate": exponents, "cells": cells})


# Verdicts, computed from the results in the JSON.


def order(ours, theirs) -> str:
    """``"better"`` or ``"worse"`` if ``ours`` is lower or higher by 1 % or more for every seed, else ``"equal"``."""
    ours, theirs = (np.array([np.inf if x is None else x for x in side], float) for side in (ours, theirs))
    if (ours * TOLERANCE <= theirs).all() and np.isfinite(ours).all():
        return "better"
    return "worse" if (theirs * TOLERANCE <= ours).all() and np.isfinite(theirs).all() else "equal"


def against(sides) -> dict[str, str]:
    """`order` of Adam's final loss against every rival's."""
    return {side: order(sides["Adam"]["loss"], x["loss"]) for side, x in sides.items() if side != "Adam"}


def sooner(ours, theirs) -> float | None:
    """Share of the steps after which our mean loss reaches their final one; None if it never does."""
    ours, theirs = (
        finite_or_inf([[np.inf if x is None else x for x in row] for row in c]).mean(0) for c in (ours, theirs)
    )
    reached = np.flatnonzero(ours <= theirs[-1])
    return None if not len(reached) else float((reached[0] + 1) / len(ours))


def overall(parts) -> str:
    """Verdict: holds if all ``parts`` are true, in part if some are."""
    return HOLDS if all(parts) else PARTLY if any(parts) else FAILS


def faster(problems) -> dict:
    names = ("mnist_logistic", "reviews", "mnist_wide_network")
    compared = {name: against(problems[name]["sides"]) for name in names}
    reached = {
        name: {
            side: sooner(problems[name]["sides"]["Adam"]["curves"], problems[name]["sides"][side]["curves"])
            for side in compared[name]
        }
        for name in names
    }
    every = [verdict == "better" for sides in compared.values() for verdict in sides.values()]
    return {
        "claim": "Adam is faster than SGD, SGD with Nesterov momentum, AdaGrad and RMSProp",
        "rule": "holds: for every problem and rival, Adam's final training loss is lower by 1 % or more for every "
        "seed, after the same steps; in part: for some; otherwise not",
        "verdict": overall(every),
        "adam": compared,
        "share_of_steps_to_their_final_loss": reached,
    }


def less_tuning(problems) -> dict:
    names = ("mnist_logistic", "reviews", "mnist_network")
    widths = {name: {side: x["width"] for side, x in problems[name]["sides"].items()} for name in names}
    widest = {name: max(sides, key=sides.get) for name, sides in widths.items()}
    return {
        "claim": "Adam needs little tuning of the learning rate",
        "rule": "holds: for every problem, no rival has a wider range of learning rates within 5 % of its own best "
        "final loss; in part: for some; otherwise not",
        "verdict": overall([side == "Adam" for side in widest.values()]),
        "decades": widths,
        "widest": widest,
    }


def sparse_and_noisy(problems) -> dict:
    compared = {name: against(problems[name]["sides"]) for name in ("reviews", "mnist_wrong_labels")}
    return {
        "claim": "Adam suits sparse and noisy gradients",
        "rule": "holds: with sparse features and with 40 % wrong labels, no rival's final training loss is lower by "
        "1 % or more for every seed; in part: with one of them; otherwise not",
        "verdict": overall(["worse" not in sides.values() for sides in compared.values()]),
        "adam": compared,
    }


def invariant(result) -> dict:
    adam, sgd = result["sides"]["Adam"], result["sides"]["SGD"]
    exact = adam["weights_that_differ"] == 0
    suffers = order(sgd["plain"]["loss"], sgd["rescaled"]["loss"]) == "better"
    return {
        "claim": "Adam's steps do not change when the gradient is rescaled coordinate by coordinate",
        "rule": "holds: with eps 0 and powers of two the weights are the same to the last bit, and SGD, its learning "
        "rate tuned again, ends 1 % or more higher for every seed; in part: only the first; otherwise not",
        "verdict": HOLDS if exact and suffers else PARTLY if exact else FAILS,
        "weights_that_differ": {side: x["weights_that_differ"] for side, x in result["sides"].items()},
        "weights": adam["weights"],
        "sgd_loss_over_plain": short(np.mean(sgd["rescaled"]["loss"]) / np.mean(sgd["plain"]["loss"])),
    }


def corrected(result) -> dict:
    """Verdict on bias correction. The best rate of a side minimizes the mean over seeds."""
    best, each, stable = {}, [], {}
    for cell in result["cells"]:
        finite = {side: ~np.isnan(numbers(cell[side]["more"])).any(0) for side in ("with", "without")}
        largest = {side: max(np.array(result["log10_rate"])[ok], default=None) for side, ok in finite.items()}
        stable[f"b1 {cell['b1']}, b2 {cell['b2']}"] = short(largest)
        for when in ("few", "more"):
            columns = {
                side: [list(column) for column in zip(*cell[side][when], strict=True)] for side in ("with", "without")
            }
            mean = lambda column: math.inf if None in column else sum(column) / len(column)
            bests = [min(columns[side], key=mean) for side in ("with", "without")]
            best[f"b1 {cell['b1']}, b2 {cell['b2']}, {when}"] = order(*bests)
            each += [order(*pair) for pair in zip(columns["with"], columns["without"], strict=True)]
    at_best, at_each = "worse" not in best.values(), "worse" not in each
    return {
        "claim": "Bias correction never hurts, and prevents instability where b2 is near 1",
        "rule": "holds: at every b1, b2, learning rate and number of steps the loss with it is not 1 % or more higher "
        "for every seed; in part: so at the best learning rate of each side; otherwise not",
        "verdict": HOLDS if at_best and at_each else PARTLY if at_best else FAILS,
        "largest_log10_rate_without_divergence": stable,
        "at_the_best_rate": best,
        "at_each_rate": {verdict: each.count(verdict) for verdict in ("better", "equal", "worse")},
    }


def with_one_cycle(problems) -> dict:
    constant, cycle = (problems[name]["sides"] for name in ("mnist_network", "mnist_one_cycle"))
    gains = {side: order(cycle[side]["loss"], constant[side]["loss"]) for side in cycle}
    rivals = against(cycle)
    helps, leads = gains["Adam"] == "better", "worse" not in rivals.values()
    return {
        "claim": "Adam works together with a one-cycle schedule",
        "rule": "holds: the schedule lowers Adam's final training loss by 1 % or more for every seed, and no rival "
        "with the schedule ends 1 % or more lower for every seed; in part: only the first; otherwise not",
        "verdict": HOLDS if helps and leads else PARTLY if helps else FAILS,
        "one_cycle_against_constant": gains,
        "adam": rivals,
    }


def verdicts(problems, rescaled, bias) -> dict:
    """``{number of the claim: verdict}``."""
    judged = (
        faster(problems),
        less_tuning(problems),
        sparse_and_noisy(problems),
        invariant(rescaled),
        corrected(bias),
        with_one_cycle(problems),
    )
    return {str(i): claim for i, claim in enumerate(judged, 1)}


# Pictures, with Okabe and Ito's colour-blind palette.
COLORS = dict(zip(SIDES, ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7"), strict=True))
MARKERS = dict(zip(SIDES, "osD^v", strict=True))
TITLES = {
    "mnist_logistic": "MNIST, logistic regression",
    "reviews": "film reviews, bag of words, 50 % dropout",
    "mnist_wide_network": "MNIST, 2 x 1,000 units, 50 % dropout",
    "mnist_network": "MNIST, 64 units, 50 % dropout, constant rate",
    "mnist_wrong_labels": "MNIST, 64 units, 40 % wrong labels",
    "mnist_one_cycle": "MNIST, 64 units, 50 % dropout, one-cycle",
}


def numbers(x):
    """Float array of JSON numbers; None becomes NaN."""
    return np.array(x, dtype=float)


def band(axis, x, rows, side, **style):
    """Plots the mean over seeds and a band from minimum to maximum."""
    rows = numbers(rows)
    axis.plot(x, rows.mean(0), color=COLORS[side], marker=MARKERS[side], ms=3, lw=1.2, **style)
    axis.fill_between(x, rows.min(0), rows.max(0), color=COLORS[side], alpha=0.25, lw=0)


def legend(axis, title=None):
    """Legend below the axis."""
    axis.legend(title=title, loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)


def log_scale(axis):
    """Logarithmic y axis with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def curves(axis, name, problem):
    """Plots loss over steps, each optimizer at its best rate."""
    for side, x in problem["sides"].items():
        points = len(x["curves"][0])
        steps = problem["steps"] / points * np.arange(1, points + 1)
        band(
            axis,
            steps,
            x["curves"],
            side,
            label=", ".join(filter(None, (side, x["variant"], f"{10 ** x['log10_rate']:.2g}"))),
        )
    axis.set(title=TITLES[name], xlabel="step", ylabel="training loss, nats")
    log_scale(axis)
    legend(axis, "optimizer, what was tuned, learning rate")


def widths(axis, name, problem):
    """Plots final loss over learning rate, both relative to the optimizer's best."""
    for side, x in problem["sides"].items():
        grid, best = x["grid"], min(loss for loss in x["grid"]["loss"] if loss is not None)
        decades = numbers(grid["log10_rate"]) - x["log10_rate"]
        label = f"{side}: {x['width']:.2f} decades"
        axis.plot(
            decades, numbers(grid["loss"]) / best, color=COLORS[side], marker=MARKERS[side], ms=3, lw=1, label=label
        )
        axis.fill_between(
            decades, numbers(grid["low"]) / best, numbers(grid["high"]) / best, color=COLORS[side], alpha=0.25, lw=0
        )
    axis.axhline(WITHIN, color="black", lw=0.8, ls=":")
    axis.set(title=TITLES[name], xlabel="learning rate over the best, decades", ylabel="final loss over the best")
    axis.set(xlim=(-1.5, 1.0), ylim=(0.95, 1.5))
    legend(axis, "optimizer, width within 5 % of its best")


def draw_rescaled(axes, result):
    """Plots plain and rescaled training of each optimizer, at the best rates."""
    for axis, (side, x) in zip(axes, result["sides"].items(), strict=True):
        for name, style in (("plain", "-"), ("rescaled", "--")):
            points = len(x[name]["curves"][0])
            steps = result["steps"] / points * np.arange(1, points + 1)
            band(axis, steps, x[name]["curves"], side, ls=style, label=f"{name}, {10 ** x[name]['log10_rate']:.2g}")
        axis.set(title=f"{side}: {x['weights_that_differ']:,} of {x['weights']:,} weights differ", xlabel="step")
        axis.set(ylabel="training loss, nats")
        log_scale(axis)
        legend(axis, "gradient, learning rate")


def draw_bias(axes, result):
    """Plots a panel for each pair of betas: with and without bias correction, after few and more steps."""
    for axis, cell in zip(np.ravel(axes), result["cells"], strict=True):
        for side, color in (("with", COLORS["Adam"]), ("without", COLORS["SGD"])):
            for when, style in (("few", ":"), ("more", "-")):
                rows = numbers(cell[side][when])
                label = f"{side}, {result['steps'][when]} steps"
                axis.plot(result["log10_rate"], rows.mean(0), color=color, ls=style, marker="o", ms=3, label=label)
                axis.fill_between(result["log10_rate"], rows.min(0), rows.max(0), color=color, alpha=0.25, lw=0)
        axis.set(title=f"b1 = {cell['b1']:g}, b2 = {cell['b2']:g}", xlabel="log10 of the learning rate")
        axis.set(ylabel="loss, nats per digit", ylim=(100, 400))
    np.ravel(axes)[0].legend(title="bias correction", frameon=False)


def plot(result, folder: Path) -> None:
    """Draws every picture, ``claims-NAME.png``."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    problems = result["problems"]

    def each(draw, *names):
        return lambda axes: [
            draw(axis, name, problems[name]) for axis, name in zip(np.ravel(axes), names, strict=False)
        ]

    pictures = {
        "faster": (2, 2, each(curves, "mnist_logistic", "reviews", "mnist_wide_network")),
        "tuning": (2, 2, each(widths, "mnist_logistic", "reviews", "mnist_network")),
        "noise": (1, 2, each(curves, "reviews", "mnist_wrong_labels")),
        "rescaling": (1, 2, lambda axes: draw_rescaled(axes, result["rescaling"])),
        "bias": (
            *((2, 3) if len(result["bias_correction"]["cells"]) == 6 else (1, len(result["bias_correction"]["cells"]))),
            lambda axes: draw_bias(axes, result["bias_correction"]),
        ),
        "one-cycle": (1, 2, each(curves, "mnist_network", "mnist_one_cycle")),
    }
    folder.mkdir(exist_ok=True)
    for name, (down, across, draw) in pictures.items():
        figure, axes = plt.subplots(
            down, across, figsize=(4.4 * across, (3.0 if name == "bias" else 4.6) * down), layout="constrained"
        )
        draw(axes)
        for axis in np.ravel(axes):
            if not axis.has_data():
                axis.remove()
        figure.canvas.draw()
        picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
        picture.quantize(64).save(folder / f"claims-{name}.png", optimize=True)  # a third of the size
        plt.close(figure)


def fingerprint(sizes: Sizes) -> str:
    """Hash of the sizes and of the sources; results of other sources are not reused."""
    sides = {side: list(variants) for side, variants in sizes.sides.items()}
    sources = b"".join(Path(module).read_bytes() for module in (__file__, training.__file__))
    return hashlib.sha256(repr(sizes._replace(sides=sides)).encode() + sources).hexdigest()


def run(options, sizes: Sizes = Sizes(), folder: Path = RESULTS):  # noqa: B008 -- a tuple
    """Runs all claims; reuses what an interrupted run has left in its scratch file."""
    scratch = folder / "claims.partial.json"
    settings = fingerprint(sizes)
    done = json.loads(scratch.read_text()) if scratch.exists() else {}
    done = done if done.get("settings") == settings else {"settings": settings}
    folder.mkdir(exist_ok=True)
    variants = sum(map(len, sizes.sides.values()))
    parts = {
        name: (variants * len(task.schedules), functools.partial(measure, task, sizes))
        for name, task in tasks(sizes).items()
    }
    parts["rescaling"] = (4, functools.partial(invariance, sizes))
    parts["bias_correction"] = (2 * len(sizes.betas), functools.partial(bias_correction, sizes))
    with Progress() as progress:
        bar = progress.add_task("claims", total=sum(count for count, _ in parts.values()))
        for name, (count, part) in parts.items():
            if name in done:
                progress.advance(bar, count)
                continue
            progress.update(bar, description=name)
            done[name] = part(lambda: progress.advance(bar))
            scratch.write_text(json.dumps(done))
    problems = {name: done[name] for name in tasks(sizes)}
    result = {"claims": verdicts(problems, done["rescaling"], done["bias_correction"]), "problems": problems}
    result |= {name: done[name] for name in ("rescaling", "bias_correction")}
    plot(result, folder)
    for number, claim in result["claims"].items():
        print(f"{number}. {claim['claim']}: {claim['verdict']}", flush=True)
    scratch.unlink()
    return result
