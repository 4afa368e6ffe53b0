"""Time of a step compared with Optax, PyTorch and the memory bandwidth, and time until the first step.

Every case runs in several new processes, because the addresses of arrays change times by up to a half; in each process
the sides take turns. Reported are medians over processes: milliseconds, the ratio to Optax in the same round, and the
ratio to the limit, a C loop that reads p, g, m, v and writes p, m, v. All arguments but gradients are donated.
"""

import ctypes
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jadam
from benchmarks.gpu_sides import one_pass, update_and_apply

PROCESSES = 5
ROUNDS = {"2^27": 7, "2^26": 9}  # other cases: 15
GROWTH = range(10, 28)
GROWING = ["optax", "jadam, two calls", "step, float32", "step, int8", "step, bfloat16, bf16 weights"]

GPT2 = [(50257, 768), (1024, 768), (768,), (768,)] + 12 * [
    *((768,), (768,), (768, 2304), (2304,), (768, 768), (768,)),
    *((768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)),
]
TOY = [(64, 32), (32,), (32, 32), (32,), (32, 32), (32,), (32, 32), (32,), (32, 10), (10,)]


def shapes(case) -> list[tuple[int, ...]]:
    """Shapes of a case: ``2^n`` is one leaf of that size, ``n leaves`` are 32x32 each."""
    if case.startswith("2^"):
        n = int(case[2:])
        return [(2 ** (n // 2), 2 ** (n - n // 2))]
    return {"GPT-2": GPT2, "toy": TOY}.get(case) or [(32, 32)] * int(case.split()[0])


def sides():
    """``{name: (optimizer, function that makes its step, dtype of parameters and gradients)}``."""
    adam = functools.partial(jadam.adam, 1e-3)
    exact = lambda moments: jadam.exact_bf16(adam(moments=moments))
    return {
        "optax": (optax.adam(1e-3), update_and_apply, jnp.float32),
        "jadam, two calls": (adam(), update_and_apply, jnp.float32),
        "step, float32": (adam(), one_pass, jnp.float32),
        "step, bfloat16": (adam(moments="bfloat16"), one_pass, jnp.float32),
        "step, int8": (adam(moments="int8"), one_pass, jnp.float32),
        "step, bfloat16, bf16 weights": (exact("bfloat16"), one_pass, jnp.bfloat16),
        "step, int8, bf16 weights": (exact("int8"), one_pass, jnp.bfloat16),
    }


def stepper(step, params, state, grads):
    """Function that takes one step, in place, and returns the seconds."""
    step = jax.jit(step, donate_argnums=(0, 1))
    held = [jax.tree.map(jnp.copy, params), state]

    def run():
        start = time.perf_counter()
        held[:] = jax.block_until_ready(step(*held, grads))
        return time.perf_counter() - start

    return run


def flashoptim(params, grads):
    """Timed step of `flashoptim-jax`'s 8-bit Adam, unfused, as its kernels need a GPU; None if not installed."""
    try:
        from flashoptim_jax import flash_adam
    except ImportError:
        return None
    tx = flash_adam(1e-3, master_weight_bits=None, fused=False)
    return stepper(tx.step, params, tx.init(params), grads)


LIMIT = """
#include <pthread.h>
struct part { float *p, *m, *v; const float *g; long n; };
static void *pass(void *x) {
  struct part a = *(struct part *)x;
#pragma GCC ivdep
  for (long i = 0; i < a.n; i++) {
    float m = a.m[i] + 0.1f * (a.g[i] - a.m[i]), v = a.v[i] + 0.001f * (a.g[i] * a.g[i] - a.v[i]);
    a.m[i] = m; a.v[i] = v; a.p[i] = a.p[i] - 0.001f * m * v;
  }
  return 0;
}
void run(float *p, float *m, float *v, const float *g, long n, int threads) {
  pthread_t thread[256];
  struct part part[256];
  for (int k = 0; k < threads; k++) {
    long from = n / threads * k, to = k + 1 == threads ? n : n / threads * (k + 1);
    part[k] = (struct part){p + from, m + from, v + from, g + from, to - from};
    pthread_create(&thread[k], 0, pass, &part[k]);
  }
  for (int k = 0; k < threads; k++) pthread_join(thread[k], 0);
}
"""


def limit(n):
    """Timed C loop over four arrays of ``n`` floats; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "limit.c", Path(folder) / "limit.so"
        source.write_text(LIMIT)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-lpthread"]
        subprocess.run([compiler, source, "-o", library, *flags], check=True)
        run = ctypes.CDLL(str(library)).run
    apart = 16 * 1024 + 1024  # floats between one array's end and the next one's start
    memory = np.full(4 * (n + apart), 0.5, np.float32)
    pointers = [ctypes.c_void_p(memory.ctypes.data + 4 * k * (n + apart)) for k in range(4)]
    threads = min(256, len(os.sched_getaffinity(0)))

    def timed(_memory=memory):
        start = time.perf_counter()
        run(*pointers, ctypes.c_long(n), threads)
        return time.perf_counter() - start

    return timed


def torch_side(python, case):
    """Timed step of ``torch.optim.Adam(fused=True)``, in a process that takes a step for every line of input."""
    program = """if True:
        import sys, time, torch
        shapes = eval(sys.argv[1])
        params = [torch.zeros(s, requires_grad=True) for s in shapes]
        for p in params: p.grad = torch.full_like(p, 0.5)
        adam = torch.optim.Adam(params, lr=1e-3, fused=True)
        for _ in sys.stdin:
            start = time.perf_counter(); adam.step(); print(time.perf_counter() - start, flush=True)
    """
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [python, "-c", program, repr(shapes(case))]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run():
        child.stdin.write("\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    return run


def one_process(case, only, torch_python) -> dict[str, list[float]]:
    """Seconds of every side in every round."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes(case)]
    params = [jnp.zeros_like(g) for g in grads]
    runs = {}
    for name, (tx, make, dtype) in sides().items():
        if only is None or name in only:
            p, g = optax.tree.cast(params, dtype), optax.tree.cast(grads, dtype)
            runs[name] = stepper(make(tx), p, tx.init(p), g)
    if only is None:
        runs["limit"] = limit(sum(g.size for g in grads))
        runs["flashoptim-jax, 8-bit"] = flashoptim(params, grads) if case in ("2^22", "2^25") else None
        runs["torch, fused"] = torch_side(torch_python, case) if torch_python else None
    runs = {name: run for name, run in runs.items() if run is not None}
    rounds = ROUNDS.get(case, 15)
    seconds = {name: [] for name in runs}
    repeat = max(1, min(50, 2**22 // sum(g.size for g in grads)))
    for i in range(rounds + 2):  # the first two warm up
        for name, run in runs.items():
            spent = statistics.median(run() for _ in range(repeat))
            seconds[name] += [spent] if i > 1 else []
    return seconds


def first_step(leaves, name) -> dict[str, float]:
    """Seconds to trace, lower and compile a step."""
    tx, make, dtype = sides()[name]
    params = [jax.ShapeDtypeStruct((32, 32), dtype)] * leaves
    state = jax.eval_shape(tx.init, params)
    marks = [time.perf_counter()]
    traced = jax.jit(make(tx), donate_argnums=(0, 1)).trace(params, state, params)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    return dict(zip(("trace", "lower", "compile"), np.diff(marks).tolist(), strict=True))


def fresh(function, *args):
    """Result of this file's ``function(*args)`` in a new process."""
    return in_fresh_process(__name__, function.__name__, *args)


def in_fresh_process(module, name, *args):
    """Result of a module's function in a new process; arguments and result as JSON."""
    program = "import importlib, json, sys; module, name, args = json.loads(sys.argv[1]); "
    program += "print(json.dumps(getattr(importlib.import_module(module), name)(*args)))"
    command = [sys.executable, "-c", program, json.dumps([module, name, args])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(processes) -> dict[str, dict]:
    """Milliseconds and ratios of each side: median, minimum and maximum over processes of each one's median."""
    rows = {}
    for name in processes[0]:
        row = {"ms": [1e3 * statistics.median(x[name]) for x in processes]}
        for other in ("optax", "limit"):
            if other in processes[0]:
                pairs = [zip(x[name], x[other], strict=True) for x in processes]
                row[f"over {other}"] = [statistics.median(a / b for a, b in pair) for pair in pairs]
        rows[name] = {k: [round(f(v), 4) for f in (statistics.median, min, max)] for k, v in row.items()}
    return rows


def show(case, rows):
    """Prints a table of medians, and the extremes of the ratio to Optax."""
    table = Table("", "ms", "over optax", "(least, most)", "over limit", title=case)
    for name, row in rows.items():
        ratio = row.get("over optax", ["-"] * 3)
        table.add_row(
            name,
            f"{row['ms'][0]:.3f}",
            *(str(x) for x in (ratio[0], tuple(ratio[1:]))),
            str(row.get("over limit", ["-"])[0]),
        )
    Console().print(table)


def run(options) -> dict:
    """Runs every case."""
    if not options.torch_python:
        print("speed: torch left out, --torch-python not given", file=sys.stderr)
    result: dict = {"backend": str(jadam.backends()["cpu"].kernel), "cases": {}}
    for case in ("2^22", "2^25", "2^27", "GPT-2", "toy"):
        args = case, None, options.torch_python
        rows = summary([fresh(one_process, *args) for _ in track(range(PROCESSES), description=f"speed: {case}")])
        result["cases"][case] = rows
        show(case, rows)
    alone = {}
    for name in ("optax", "jadam, two calls", "step, float32", "step, int8"):
        runs = [
            fresh(one_process, "1000 leaves", [name], None)
            for _ in track(range(7), description=f"speed: 1000 leaves, {name}")
        ]
        alone[name] = {"ms": statistics.median(1e3 * statistics.median(x[name]) for x in runs)}
    result["1000 leaves, each side alone"] = alone
    print("1000 leaves of 32x32, ms:", {name: round(row["ms"], 2) for name, row in alone.items()})
    growth = {}
    for n in track(GROWTH, description="speed: growth"):
        growth[n] = summary([fresh(one_process, f"2^{n}", GROWING, None)])
    result["growth"] = growth
    first = {}
    for leaves in (10, 100, 1000, 3000):
        for name in ("optax", "step, float32"):
            runs = [fresh(first_step, leaves, name) for _ in range(3)]
            first[f"{leaves} leaves, {name}"] = sorted(runs, key=lambda x: sum(x.values()))[1]
            print(
                f"first step, {leaves} leaves, {name}:",
                {k: round(v, 2) for k, v in first[f"{leaves} leaves, {name}"].items()},
            )
    result["first step, seconds"] = first
    draw(result)
    return result


def draw(result):
    """Draws times over the number of parameters, and each side's ratio to the limit at 2^25."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = ("#999999", "#000000", "#0072b2", "#e69f00", "#009e73")  # Okabe & Ito's
    lines = ("-", ":", "-", "--", "-.")
    for name, color, line in zip(next(iter(result["growth"].values())), colors, lines, strict=True):
        times = [rows[name]["ms"][0] for rows in result["growth"].values()]
        left.loglog([2 ** int(n) for n in result["growth"]], times, line, color=color, lw=2, label=name)
    left.set(xlabel="parameters", ylabel="milliseconds a step", title="one array")
    left.legend()
    rows = {k: v for k, v in result["cases"]["2^25"].items() if "over limit" in v and not k.startswith("flash")}
    right.barh(list(rows), [v["over limit"][0] for v in rows.values()], color="#0072b2")
    right.axvline(1, color="k", lw=0.8)
    right.set(title="33.5 million parameters", xlabel="time over that of a pass over memory, float32")
    right.invert_yaxis()
    figure.savefig(Path(__file__).parent / "results" / "speed.png", dpi=110)
    pyplot.close(figure)
