"""What `jadam.record` costs at every=100: cycles of 100 steps with it and without, ten by turns, in one process.

Given is the ratio of their times, a cycle holding one record: the median over pairs of cycles, and the quartiles.
Every four cycles both sides are laid out in memory anew, by turns first: where arrays lie makes a few per cent. GPT-2,
2^25 and 2^22 are the optimizer's step alone, the harshest measure; the others are whole training steps: `lean`'s two,
and a network of five narrow layers, all of whose arithmetic takes no longer than the calls. Programs run on the calling
thread: XLA else would run the side without, a program of few operations, there and the other in the background, which
costs int8 a tenth of 2 ms.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from benchmarks.lean import digits, text
from benchmarks.speed import TOY, one_pass, shapes, two_calls

EVERY = 100
TURN = 10  # steps of one side, then of the other
CYCLES = {"GPT-2": 6, "2^25": 8, "2^22": 40, "transformer": 12, "digits": 40, "toy": 40}
TRAININGS = {"transformer": text, "digits": digits}
BAR = 1.02  # of a step without it


def problem(case):
    """Parameters, the gradient as a function of them and of an array, that array."""
    if case in TRAININGS:
        params, batches, loss, _ = TRAININGS[case](steps=1)
        return params, jax.grad(loss), jnp.asarray(batches[0])
    if case == "toy":
        return [jnp.zeros(shape) for shape in TOY], jax.grad(toy_loss), jnp.ones((128, TOY[0][0]))
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes(case)]
    return [jnp.zeros_like(g) for g in grads], lambda params, grads: grads, grads


def toy_loss(params, x):
    """Of the toy's network, its outputs to be 1."""
    for kernel, bias in zip(params[::2], params[1::2], strict=True):
        x = jnp.tanh(x @ kernel + bias)
    return jnp.mean((x - 1) ** 2)


def steps(tx, make, gradient, x):
    """A function that takes ``TURN`` steps of what it holds, in place, and returns their seconds."""
    take = make(tx)
    step = jax.jit(lambda params, state, x: take(params, state, gradient(params, x)), donate_argnums=(0, 1))

    def run(held):
        start = time.perf_counter()
        for _ in range(TURN):
            held[:] = step(*held, x)
        jax.block_until_ready(held)
        return time.perf_counter() - start

    return run


def measure(case, moments, make) -> dict:
    """Ratios for one case."""
    params, gradient, x = problem(case)
    tx = jadam.adam(1e-3, moments=moments)
    both = [tx, jadam.record(tx, every=EVERY)]
    runs = [steps(side, make, gradient, x) for side in both]
    pairs = []
    for i in range(CYCLES[case]):
        if i % 4 == 0:
            order = (0, 1) if i % 8 else (1, 0)
            held = {k: [jax.tree.map(jnp.copy, params), both[k].init(params)] for k in order}
            for k in 2 * order:
                runs[k](held[k])
        seconds = [0.0, 0.0]
        for turn in range(EVERY // TURN):
            for k in order if turn % 2 else order[::-1]:
                seconds[k] += runs[k](held[k])
        pairs.append(seconds)
    ratios = [b / a for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ms a step without": round(1e3 / EVERY * statistics.median(a for a, _ in pairs), 4),
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(low, 4), round(high, 4)],
    }


def run(options) -> dict:
    """Every case."""
    del options
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the first array
    result = {}
    table = Table("", "ms a step without", "ratio", "quartiles", title=f"jadam.record, every={EVERY}; bar {BAR}")
    how = {"step": one_pass, "two calls": two_calls}
    cases = [(case, moments, "step") for case in CYCLES for moments in ("float32", "int8")]
    for case, moments, name in track([*cases, ("2^25", "float32", "two calls")], description="record"):
        row = measure(case, moments, how[name])
        result[f"{case}, {moments}, {name}"] = row
        table.add_row(f"{case}, {moments}, {name}", *map(str, row.values()))
    Console().print(table)
    return {"every": EVERY, "bar": BAR, "cases": result}
