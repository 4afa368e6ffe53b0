"""What `jadam.record` costs at every=100: cycles of 100 steps with it and without, by turns, in one process.

Given is the ratio of their times, a cycle holding one record: the median over pairs of cycles, and the quartiles. A
step is the optimizer's alone, but the toy is a network of five layers trained on batches of 128: the optimizer's step
alone takes it no longer than the call. Programs run on the calling thread: XLA else would run the side without, a
program of few operations, there and the other in the background, which costs int8 a tenth of a step of 2 ms.
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
from benchmarks.speed import TOY, one_pass, shapes, two_calls

EVERY = 100
CYCLES = {"GPT-2": 4, "2^25": 8, "2^22": 40, "toy": 200}
BAR = 1.02  # of a step without it


def cycle(tx, make, params, grads):
    """A function that takes ``EVERY`` steps, in place, and returns their seconds."""
    take = make(tx)
    if len(grads) == len(TOY):
        take = lambda params, state, x: make(tx)(params, state, jax.grad(toy_loss)(params, x))
        grads = jnp.ones((128, TOY[0][0]))
    step = jax.jit(take, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run():
        start = time.perf_counter()
        for _ in range(EVERY):
            held[:] = step(*held, grads)
        jax.block_until_ready(held)
        return time.perf_counter() - start

    return run


def toy_loss(params, x):
    """Of the toy's network, its outputs to be 1."""
    for kernel, bias in zip(params[::2], params[1::2], strict=True):
        x = jnp.tanh(x @ kernel + bias)
    return jnp.mean((x - 1) ** 2)


def measure(case, moments, make) -> dict:
    """Ratios for one case."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes(case)]
    params = [jnp.zeros_like(g) for g in grads]
    tx = jadam.adam(1e-3, moments=moments)
    runs = [cycle(x, make, params, grads) for x in (tx, jadam.record(tx, every=EVERY))]
    for run in runs:
        run()
    pairs = []
    for i in range(CYCLES[case]):
        seconds = {k: runs[k]() for k in ((0, 1) if i % 2 else (1, 0))}
        pairs.append((seconds[0], seconds[1]))
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
