"""Cost of `jadam.record` at every=100, in one process.

A cycle has 100 steps, one of which records; sides with and without `record` take turns of ten steps. Reported are the
median and quartiles of the ratio of times over pairs of cycles. The side without is measured twice: the ratio of the
two is the measurement's noise. Arrays are allocated anew every two cycles, each side first in turn, because addresses
make a difference of a few per cent.

GPT-2, 2^25 and 2^22 are the optimizer's step alone, the hardest case. The others are whole training steps: the two of
`lean`, and a network of five narrow layers whose arithmetic takes no longer than the calls. Asynchronous dispatch is
off: XLA would run the small program without `record` on the calling thread and the other in the background, which costs
0.2 ms with int8.
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
from benchmarks.speed import TOY, one_pass, shapes, update_and_apply

EVERY = 100
TURN = 10  # steps of one side, then of the other
CYCLES = {"GPT-2": 6, "2^25": 6, "2^22": 40, "transformer": 12, "digits": 40, "toy": 40}
TRAININGS = {"transformer": text, "digits": digits}
BAR = 1.02  # largest accepted ratio


def problem(case):
    """``(params, gradient, x)`` of a case; ``gradient(params, x)``."""
    if case in TRAININGS:
        params, batches, loss, _ = TRAININGS[case](steps=1)
        return params, jax.grad(loss), jnp.asarray(batches[0])
    if case == "toy":
        return [jnp.zeros(shape) for shape in TOY], jax.grad(toy_loss), jnp.ones((128, TOY[0][0]))
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes(case)]
    return [jnp.zeros_like(g) for g in grads], lambda params, grads: grads, grads


def toy_loss(params, x):
    """Loss of the toy network, with targets 1."""
    for kernel, bias in zip(params[::2], params[1::2], strict=True):
        x = jnp.tanh(x @ kernel + bias)
    return jnp.mean((x - 1) ** 2)


def steps(tx, make, gradient, x):
    """Function that takes ``TURN`` steps of ``[params, state]``, in place, and returns the seconds."""
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
    """Time and ratios of one case."""
    params, gradient, x = problem(case)
    tx = jadam.adam(1e-3, moments=moments)
    sides = [tx, tx, jadam.record(tx, every=EVERY)]
    runs = [steps(side, make, gradient, x) for side in sides]
    cycles = []
    for i in range(CYCLES[case]):
        if i % 2 == 0:
            order = np.roll(range(3), i // 2).tolist()
            held = {k: [jax.tree.map(jnp.copy, params), sides[k].init(params)] for k in order}
            for k in 2 * order:
                runs[k](held[k])
        seconds = [0.0, 0.0, 0.0]
        for turn in range(EVERY // TURN):
            for k in order if turn % 2 else order[::-1]:
                seconds[k] += runs[k](held[k])
        cycles.append(seconds)
    without, again, record = np.transpose(cycles)
    result = {"ms a step without": round(1e3 / EVERY * statistics.median(without.tolist()), 4)}
    for name, times in ("", record), ("the same twice, ", again):
        low, median, high = statistics.quantiles((times / without).tolist(), n=4, method="inclusive")
        result[name + "ratio"] = round(median, 4)
        result[name + "quartiles"] = [round(low, 4), round(high, 4)]
    return result


def run(options) -> dict:
    """Runs every case."""
    del options
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the first array
    result = {}
    columns = ["ms a step without", "ratio", "quartiles", "the same twice", "its quartiles"]
    table = Table("", *columns, title=f"jadam.record, every={EVERY}; bar {BAR}")
    how = {"step": one_pass, "two calls": update_and_apply}
    cases = [(case, moments, "step") for case in CYCLES for moments in ("float32", "int8")]
    for case, moments, name in track([*cases, ("2^25", "float32", "two calls")], description="record"):
        row = measure(case, moments, how[name])
        result[f"{case}, {moments}, {name}"] = row
        table.add_row(f"{case}, {moments}, {name}", *map(str, row.values()))
    Console().print(table)
    return {"every": EVERY, "bar": BAR, "cases": result}
