"""Correctness and speed on one GPU: ``python -m benchmarks gpu``, within ``--minutes`` (5), without network.

It needs JAX and Optax; PyTorch, bitsandbytes and flashoptim-jax are compared with if they are installed. In this order:

* the card, its driver, versions, the kernels that serve, and the bandwidth of ``x + 1`` in place;
* `jadam.step` for every rule and format against XLA on the card, against the CPU, and against float64;
* times of all sides for GPT-2's 148 leaves, one leaf of 2^27, and others;
* a loop of steps as a CUDA graph, and ``compute-sanitizer`` over a short run, in child processes.

What fails is printed with its error's first line and left out; the results file is written anew after every case. What
does not fit into the time, as earlier cases tell, is left out and named at the end; a watchdog ends a run that hangs.
The exit status is 1 if a check fails. ``--cpu`` runs the same code on a CPU with small sizes.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import gpu_checks, gpu_sides
from benchmarks.gpu_sides import SIDES
from benchmarks.running import TimedRun, card_name, describe_machine, first_line, print_table

HERE = Path(__file__).resolve().parent
MINUTES = 5.0
SHARE_OF_CHECKS = 0.4  # of the time; checks that do not fit come again at the end
UNKNOWN = 4.0  # seconds that the first case of a kind may take, which nothing tells
GRAPHS = {  # XLA's flags; it calls a CUDA graph a command buffer, and by default wants five operations in one
    "graph of the loop's body": "--xla_gpu_graph_min_graph_size=1",
    "no graph": "--xla_gpu_enable_command_buffer=",
    "graph of the whole loop": "--xla_gpu_graph_min_graph_size=1 "
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUDNN,CUSTOM_CALL,WHILE",
}
TOOLS = ("memcheck", "racecheck")


class Bench(TimedRun):
    """A timed run on a device."""

    def __init__(self, device, small: bool, out: Path, minutes: float):
        super().__init__("gpu", out, minutes)
        self.device, self.small = device, small
        self.result = {"checks": {}, "cases": {}, "CUDA graph": {}, "compute-sanitizer": {}}
        self.pace: dict[str, float] = {}  # seconds to compile a side, per leaf


def find_device(options):
    """The device, or None without a GPU: then prints so."""
    if options.cpu:
        return jax.devices("cpu")[0]
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        print(f"gpu: skipped, JAX finds no GPU ({first_line(error)}). Install jax[cuda12] or jax[cuda13]; or --cpu.")
        return None


def run(options) -> dict:
    """Runs everything. Writes its results itself, after every case."""
    device = find_device(options)
    if device is None:
        return {}
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    default = HERE / "results" / f"gpu-{card_name(device)}.json"
    default = Path(tempfile.gettempdir()) / "gpu-cpu.json" if options.cpu else default
    minutes = MINUTES if options.minutes is None else options.minutes
    bench = Bench(device, options.cpu, Path(options.out or default), minutes)
    bench.watchdog.start()
    with jax.default_device(device):
        try:
            header(bench, options)
            later = check(bench, gpu_checks.checks(bench.small), bench.seconds * (1 - SHARE_OF_CHECKS))
            sets = gpu_sides.parameter_sets(bench.small)
            first = list(sets)[:2]
            for name in first:
                measure(bench, name, sets[name])
            graphs(bench)
            for name in sets:
                if name not in first:
                    measure(bench, name, sets[name])
            sanitize(bench)
            later = check(bench, later, 0)
            bench.left_out += [f"check of {x.name}" for x in later]
        finally:
            bench.write()
            summary(bench)
            bench.watchdog.cancel()
    print(f"gpu: written to {bench.out}")
    if bench.failed:
        raise SystemExit(f"gpu: {len(bench.failed)} checks failed: {'; '.join(bench.failed)}")
    return {}


# ---------------------------------------------------------------- what it runs on


def header(bench, options) -> None:
    """Prints and records card, driver, versions, kernels and bandwidth."""
    facts = {
        "command": f"python -m benchmarks gpu --minutes {bench.minutes:g}" + " --cpu" * options.cpu,
        **describe_machine(bench.device),
    }
    bench.result = {**facts, **bench.result}
    for name in ("card", "driver", "platform", "versions", "kernels"):
        print(f"gpu: {name}: {facts[name]}", flush=True)
    try:
        rate, elements = gpu_sides.copy_bandwidth(2**18 if bench.small else 2**27)
        bench.result["copy, GB/s"] = round(rate / 1e9, 2)
        print(f"gpu: x + 1 in place over {elements} float32 numbers: {rate / 1e9:.0f} GB/s", flush=True)
    except Exception as error:
        bench.error("copy bandwidth", error)
    bench.write()


# ---------------------------------------------------------------- correctness


def check(bench, checks, reserve) -> list:
    """Runs checks while more than ``reserve`` seconds are left; returns the others."""
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:  # JAX_PLATFORMS without cpu
        cpu = None
        print(f"gpu: not compared with the CPU: {first_line(error)}")
    longest = UNKNOWN
    for i, one in enumerate(checks):
        if bench.left() < reserve + longest:
            return checks[i:]
        start = time.monotonic()
        try:
            rows = one.run(device=bench.device, cpu=cpu)
        except Exception as error:
            bench.error(f"check of {one.name}", error)
            bench.failed.append(one.name)
            continue
        finally:
            longest = max(longest, time.monotonic() - start)
        report(bench, one.name, rows)
    return []


def report(bench, name, rows) -> None:
    """Prints a check: its largest numbers beside what is allowed, and every row that fails."""
    short = lambda numbers, row: {key: float(f"{numbers[key]:.4g}") for key in row.measured if key in numbers}
    bench.result["checks"][name] = [
        {"row": row.name, "ok": not row.failures, "note": row.note}
        | {"measured": short(row.measured, row), "allowed": short(row.allowed, row)}
        for row in rows
    ]
    bench.write()
    failing = [row for row in rows if row.failures]
    text = []
    for key in dict.fromkeys(key for row in rows for key in row.measured):
        largest = max(row.measured.get(key, 0) for row in rows)
        bound = next((row.allowed[key] for row in rows if key in row.allowed), None)
        if largest or len(rows[0].measured) == 1:
            text.append(f"{key} {largest:.3g}" + (f" (<= {bound:.3g})" if bound is not None else ""))
    note = f" [{rows[0].note}]" if rows and rows[0].note else ""
    print(f"gpu: {'FAIL' if failing else 'pass'}: {name}{note}: {', '.join(text) or 'equal'}", flush=True)
    for row in failing:
        bench.failed.append(f"{name}, {row.name}")
        for key in row.failures:
            print(f"gpu:   FAIL: {row.name}: {key} {row.measured[key]:.4g} > {row.allowed[key]:.4g}", flush=True)


# ---------------------------------------------------------------- speed


def measure(bench, case, shapes) -> None:
    """Compiles and times the sides of a case."""
    wanted = gpu_sides.MANY_LEAVES if case.endswith("leaves of 32x32") else tuple(SIDES)
    sides, grads, longest = {}, {}, 0.0
    for name in wanted:
        make, dtype = SIDES[name]
        start = time.monotonic()
        if bench.left() < max(UNKNOWN, 2 * bench.pace.get(name, longest / len(shapes)) * len(shapes)):
            bench.left_out.append(f"{case}: {name}")
            continue
        try:
            if dtype not in grads:
                grads[dtype] = gpu_sides.gradients(shapes, dtype)
            sides[name] = make(grads[dtype])
        except ImportError as error:
            bench.missing(name, error)
        except Exception as error:
            bench.error(f"{case}: {name}", error)
        else:
            seconds = time.monotonic() - start
            longest = max(longest, seconds)
            bench.pace[name] = min(seconds / len(shapes), bench.pace.get(name, seconds))
    rows = {}
    facts = {name: {**side.facts, "bytes": side.bytes} for name, side in sides.items()}
    times = gpu_sides.time_sides(sides, lambda name, error: bench.error(f"{case}: {name}", error), bench.left)
    bandwidth = 1e9 * bench.result.get("copy, GB/s", float("nan"))
    for name, row in times.items():
        ms = row.get("in a loop, ms", row.get("a call, ms"))
        share = facts[name]["bytes"] / (bandwidth * ms / 1e3)
        rows[name] = {**row, **facts[name], **({"share of copy": round(share, 3)} if share == share else {})}
    if rows:
        bench.result["cases"][case] = {"leaves": len(shapes), "sides": rows}
        bench.write()
        text = ", ".join(f"{name} {x.get('in a loop, ms') or x['a call, ms']:.3g}" for name, x in rows.items())
        print(f"gpu: {case}, ms: {text}", flush=True)
    if "torch" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["torch"].cuda.empty_cache()


# ---------------------------------------------------------------- child processes


def child(bench, *arguments, before=(), seconds=math.inf, **env):
    """A finished process of `gpu_sides`; ``before`` is put before Python."""
    more = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | ({"JAX_PLATFORMS": "cpu"} if bench.small else {}) | env
    command = [*before, sys.executable, "-m", "benchmarks.gpu_sides", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=HERE.parent, env={**os.environ, **more}, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=min(seconds, bench.left()))
        except BaseException:  # compute-sanitizer has a child of its own
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def graphs(bench) -> None:
    """Times a loop of steps of GPT-2 with and without CUDA graphs."""
    longest = UNKNOWN
    for name, flags in list(GRAPHS.items())[: 1 if bench.small else None]:
        start = time.monotonic()
        if bench.left() < longest:
            bench.left_out.append(name)
            continue
        with tempfile.TemporaryDirectory() as dump:
            flags = " ".join([os.environ.get("XLA_FLAGS", ""), flags, f"--xla_dump_to={dump}"]).strip()
            flags += " --xla_dump_hlo_module_re=.*loop.*"
            try:
                done = child(bench, "graph", "small" if bench.small else "whole", dump, XLA_FLAGS=flags)
                rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                if not rows:
                    raise RuntimeError(last_line(done))
            except Exception as error:
                bench.error(name, error)
                continue
            finally:
                longest = max(longest, time.monotonic() - start)
        bench.result["CUDA graph"][name] = rows
        bench.write()
        for row in rows:
            graph = row.get("graph") or "the dump does not tell whether XLA makes a graph"
            what = row.get("error") or f"{row['in a loop, ms']:.4f} ms, {graph}"
            print(f"gpu: {name}: GPT-2, {row['side']}: {what}", flush=True)


def sanitizer() -> str | None:
    """Path of ``compute-sanitizer``, also in a CUDA toolkit or a wheel of NVIDIA's."""
    folders = [Path("/usr/local/cuda/bin"), Path("/usr/local/cuda/compute-sanitizer")]
    for entry in sys.path:
        folders += Path(entry, "nvidia").glob("*/bin") if entry else ()
        folders += Path(entry, "nvidia").glob("*/compute-sanitizer") if entry else ()
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def sanitize(bench) -> None:
    """Runs ``compute-sanitizer`` over two steps in every format."""
    path = None if bench.small else sanitizer()
    if path is None:
        why = "no device code on a CPU" if bench.small else "compute-sanitizer is not installed"
        print(f"gpu: memcheck and racecheck left out: {why}", flush=True)
        bench.result["compute-sanitizer"] = why
        return
    for tool in TOOLS:
        if bench.left() < 10:
            bench.left_out.append(tool)
            continue
        before = [path, "--tool", tool, "--error-exitcode", "9"]
        try:  # XLA's own allocator would hide a wrong access within its pool
            done = child(bench, "short", before=before, seconds=90, XLA_PYTHON_CLIENT_ALLOCATOR="platform")
            if done.returncode not in (0, 9):
                raise RuntimeError(last_line(done))
        except Exception as error:
            bench.error(tool, error)
            continue
        found = [x.strip("= ") for x in done.stdout.splitlines() if "SUMMARY" in x or "Error" in x or "Invalid" in x]
        ok = done.returncode == 0
        bench.result["compute-sanitizer"][tool] = {"ok": ok, "output": found[-20:]}
        bench.failed += [] if ok else [tool]
        print(f"gpu: {'pass' if ok else 'FAIL'}: {tool}: {found[-1] if found else 'no summary'}", flush=True)
        bench.write()


def last_line(done) -> str:
    """Exit code and last line of a process."""
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return f"exit {done.returncode}: {lines[-1]}"


# ---------------------------------------------------------------- results


COLUMNS = {  # of the results: header and format in the table
    "in a loop, ms": ("loop ms", "{:.4f}"),
    "a call, ms": ("call ms", "{:.4f}"),
    "share of copy": ("of copy", "{:.2f}"),
    "compile, s": ("compile s", "{:.2f}"),
    "kernels": ("kernels", "{}"),
    "custom calls": ("custom", "{}"),
    "temporaries, bytes per parameter": ("temp B", "{:.3f}"),
}


def summary(bench) -> None:
    """Prints the tables and what was left out, and draws the plot."""
    for case, found in bench.result["cases"].items():
        rows = [
            [name, *("-" if row.get(x) is None else form.format(row[x]) for x, (_, form) in COLUMNS.items())]
            for name, row in found["sides"].items()
        ]
        print_table(case, ["", *(x for x, _ in COLUMNS.values())], rows)
    checks = bench.result["checks"].values()
    number, wrong = sum(map(len, checks)), sum(not row["ok"] for rows in checks for row in rows)
    print(f"gpu: {number} comparisons, {wrong} failed", flush=True)
    if bench.left_out:
        print(f"gpu: left out, out of time: {'; '.join(bench.left_out)}", flush=True)
    if bench.result["cases"]:
        try:
            draw(bench.result, bench.out.with_suffix(".png"))
        except ImportError as error:
            print(f"gpu: no plot: {first_line(error)}", flush=True)
        except Exception as error:
            bench.error("plot", error)


def draw(result, path: Path) -> None:
    """Draws each side's time in a loop, and the time that its bytes take at the bandwidth of a copy."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cases = result["cases"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.set_axis_off()
    for axis, (case, found) in zip(axes.flat, cases.items(), strict=False):
        names = list(found["sides"])
        sides = found["sides"].values()
        in_loop = ["in a loop, ms" in x for x in sides]
        ms = [x.get("in a loop, ms", x.get("a call, ms")) for x in sides]
        labels = [name if loop else f"{name} (calls)" for name, loop in zip(names, in_loop, strict=True)]
        axis.barh(labels, ms, color="#0072b2")
        if "copy, GB/s" in result:
            limits = [x["bytes"] / result["copy, GB/s"] / 1e6 for x in sides]
            axis.plot(limits, labels, "|", color="#e69f00", ms=14, mew=2, label="its bytes, copied")
            axis.legend(loc="lower right")
        axis.set(title=case, xlabel="milliseconds a step")
        axis.invert_yaxis()
    figure.suptitle(f"{result['card']}, {result['date']}, jax {result['jax']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
