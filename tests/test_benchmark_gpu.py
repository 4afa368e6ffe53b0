"""The benchmark `gpu` on a CPU, with few and tiny cases: what fails is left out, and the time is kept."""

import functools
import json
import os
import queue
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from helpers import ROOT, subprocess_env

import jadam

sys.path.append(str(ROOT))  # behind an installed jadam

from benchmarks import gpu, gpu_checks, gpu_sides

FEW = """if True:
    import sys
    from benchmarks import __main__, gpu, gpu_checks, gpu_sides

    def fails(grads):
        raise RuntimeError("first line\\nsecond line")

    def write(bench, write=gpu.Bench.write):
        write(bench)
        print("written:", [*bench.result["cases"]])

    gpu.Bench.write = write
    gpu_sides.ROUNDS = 2
    gpu_sides.parameter_sets = lambda small: {"GPT-2": [(64, 128), (7,)], "one leaf": [(3, 5)]}
    sides = {name: gpu_sides.SIDES[name] for name in ("Optax", "step int8")}
    gpu.SIDES = {"fails": (fails, "float32"), **sides}
    every = gpu_checks.checks(True)
    checks = {"few": [every[3], every[6]], "all": every}[sys.argv.pop()]
    gpu_checks.checks = lambda small: checks
    sys.exit(__main__.main())
"""


def run_gpu(out, checks, *arguments):
    """Standard output of the benchmark on a CPU with these checks, and the results file."""
    command = [sys.executable, "-c", FEW, "gpu", "--cpu", "--out", str(out), *arguments, checks]
    done = subprocess.run(
        command, cwd=ROOT, env=subprocess_env(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text())


def test_runs_to_the_end(tmp_path):
    text, result = run_gpu(tmp_path / "new" / "result.json", "few")
    assert [x for x in text.splitlines() if "fails" in x and "failed" in x] == [
        "gpu: GPT-2: fails failed: RuntimeError: first line",
        "gpu: one leaf: fails failed: RuntimeError: first line",
    ]
    for cases in (["GPT-2"], ["GPT-2", "one leaf"]):  # after each
        assert f"written: {cases}" in text
    assert list(result["checks"]) == ["NaN and infinity, float32", "float64, b2 0.95"]
    assert result["left out"] == []
    for case in ("GPT-2", "one leaf"):
        sides = result["cases"][case]["sides"]
        assert list(sides) == ["Optax", "step int8"]
        for row in sides.values():
            assert {"in a loop, ms", "a call, ms", "compile, s", "share of copy", "kernels"} <= set(row)
    assert result["cases"]["one leaf"]["sides"]["Optax"]["bytes"] == 7 * 15 * 4 + 2 * 4  # and the count
    assert [row["side"] for row in result["CUDA graph"]["graph of the loop's body"]] == ["step int8", "step float32"]
    assert (tmp_path / "new" / "result.png").exists()


def test_cases_that_do_not_fit_are_named(tmp_path):
    text, result = run_gpu(tmp_path / "result.json", "all", "--minutes", "0.05")
    assert "check of radam, nesterov, bfloat16" in result["left out"]
    assert "one leaf: step int8" in result["left out"]
    assert "left out, out of time: " in text


@pytest.mark.parametrize("written", [False, True])
def test_a_run_that_hangs_is_ended(written, tmp_path, monkeypatch):
    ended = queue.Queue()
    monkeypatch.setattr(os, "_exit", ended.put)
    bench = gpu.Bench(jax.devices()[0], True, tmp_path / "result.json", 1e-3)
    if written:
        bench.write()
    bench.watchdog.start()
    assert ended.get(timeout=100) == (0 if written else 1)


@pytest.mark.parametrize(
    ("out", "minutes", "message"),
    [
        ("x.json", 0, "gpu: --minutes must be > 0 and finite, got 0"),
        ("x.json", float("nan"), "gpu: --minutes must be > 0 and finite, got nan"),
        ("x.png", 1, "gpu: --out must be a .json file, got .*x.png"),
        ("folder.json", 1, "gpu: --out must be a .json file, got .*folder.json"),
        ("folder.json/file.txt/x.json", 1, "gpu: --out: cannot write .*x.json: "),
    ],
)
def test_bad_options(out, minutes, message, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "folder.json" / "file.txt").touch()
    with pytest.raises(SystemExit, match=message):
        gpu.Bench(jax.devices()[0], True, tmp_path / out, minutes)


def test_without_a_gpu_it_is_skipped(capsys):
    assert gpu.run(SimpleNamespace(minutes=5.0, cpu=False, out=None)) == {}
    assert capsys.readouterr().out.startswith("gpu: skipped, JAX finds no GPU (")


def test_a_failed_check_is_told(tmp_path, capsys):
    bench = gpu.Bench(jax.devices()[0], True, tmp_path / "result.json", 1.0)
    rows = [gpu_checks.Row("a", {"x": 1.0}, {"x": 1.0}), gpu_checks.Row("b", {"x": np.nan}, {"x": 1.0})]
    gpu.report(bench, "check", rows)
    assert bench.failed == ["check, b"]
    assert "FAIL: check: " in capsys.readouterr().out
    assert [row["ok"] for row in json.loads(bench.out.read_text())["checks"]["check"]] == [True, False]


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_checks_detect_another_rule(moments, monkeypatch):
    """Where XLA computes with another b2, those against XLA fail, and those against the CPU do not."""
    cpu, make = jax.devices()[0], functools.partial(jadam.adam, 1.0)
    other = jadam.exact_bf16(jadam.adam(1.0, b2=0.99901, moments=moments))

    def update_and_apply(_, grads, state, params):
        updates, state = other.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    monkeypatch.setattr(gpu_checks, "_update_and_apply", update_and_apply)
    kinds = ["float32 weights, float32 gradients"]
    rows = gpu_checks._agreement(make, moments, [(64, 77)], [*gpu_checks.KINDS][3:] + kinds, device=cpu, cpu=cpu)
    assert {row.name for row in rows if row.failures} == {row.name for row in rows if "XLA" in row.name}


THUNKS = """\
000: kCommandBuffer [source       | next=002 (1)]
    001: kCopy [source | sink] kCopy
002: kWhile         [prev=000 (1) | sink        ]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        004: kCustomKernel [source       | sink        ] loop_add_fusion_1 grid: [1, 1, 1]
        005: kCustomCall [prev=004 (1) | sink        ] jadam_step
"""


def test_operations_in_cuda_graphs():
    """As XLA's dump tells; the loop's condition is not in a graph."""
    assert gpu_sides.captured_thunks(THUNKS) == "2 of the loop's 3 operations in CUDA graphs"
    whole = "000: kCommandBuffer [source]\n" + "".join(f"    {x}\n" for x in THUNKS.splitlines())
    assert gpu_sides.captured_thunks(whole).startswith("3 of the loop's 3 operations in CUDA graphs, the loop")
