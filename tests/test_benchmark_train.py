"""The benchmark `train` with a small model: it learns, ends in time, and resumes where it was killed."""

import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, subprocess_env

import jadam

sys.path.append(str(ROOT))  # behind an installed jadam

from benchmarks.train import aot, checkpoint, model, sides, text, training

SMALL = model.SIZES["tiny"]._replace(layers=1, context=16, batch=4, steps=6, chunk=2, seeds=2)
FEW = (sides.REFERENCE, sides.LEAN)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(model.SIZES, "tiny", SMALL)


def options(tmp_path, **changes):
    return SimpleNamespace(
        **{"size": "tiny", "aot": False, "quick": False, "minutes": 30.0, "out": tmp_path / "result.json", **changes}
    )


def only(monkeypatch, names):
    """Leaves these sides."""
    every = sides.sides
    monkeypatch.setattr(training, "sides", lambda *given: {name: every(*given)[name] for name in names})


# ---------------------------------------------------------------- text


def test_order_and_split_depend_on_contents_only(tmp_path):
    files = {f"{i}.py": b"x = %d\n" % i for i in range(40)} | {"same.py": b"x = 1\n", "empty.py": b""}
    for name, contents in files.items():
        (tmp_path / name).write_bytes(contents)
    paths = [tmp_path / name for name in files]
    train, test = text.read(lambda: paths)
    assert (train, test) == text.read(lambda: paths[::-1])
    assert sorted(train + test) == sorted(b"x = %d\n" % i for i in range(40))
    assert len(test) == 2  # 5 % of 40
    assert train + test != sorted(train + test)
    assert text.read(lambda: paths, seed=1) != (train, test)
    assert text.checksum(train, test) != text.checksum(train[::-1], test)
    train, test = text.read(lambda: paths, most=50)
    assert sum(map(len, train + test)) <= 50


def test_entropy():
    assert text.Text(np.arange(8), np.arange(8), {}).entropy == pytest.approx(math.log(8), rel=1e-15)


def test_tokens_are_kept(monkeypatch):
    train, test = text.read(text.codecs)
    tokens = text.by_pairs(train[:20], test[:2], 400)
    assert 256 < tokens.train.max() < 400
    assert len(tokens.train) < sum(map(len, train[:20])) / 2  # bytes that are pairs
    assert tokens.facts["files"] == [20, 2]
    monkeypatch.setattr(text, "train_tokeniser", None)
    np.testing.assert_array_equal(tokens.train, text.by_pairs(train[:20], test[:2], 400).train)
    with pytest.raises(TypeError):  # other files: trained again
        text.by_pairs(train[:19], test[:2], 400)


def test_sources_of_this_machine():
    library, packages = text.standard_library(), text.packages()
    assert {"ast.py", "difflib.py"} <= {x.name for x in library}
    assert not any("site-packages" in x.parts for x in library)
    assert any(x.parts[-2:] == ("jax", "__init__.py") for x in packages)


# ---------------------------------------------------------------- model and sides


def test_gpt2_is_gpt2():
    shapes = model.shapes(model.SIZES["gpt2"])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 124_439_808  # as published
    kernels = jax.tree.leaves(shapes["blocks"])
    assert all(x.shape[0] == 12 for x in kernels)  # layers of the scan


def test_logits_depend_on_earlier_tokens_only():
    graph, _ = jax.eval_shape(lambda: model.create(SMALL))
    params = training.initial_weights(SMALL, 0)
    logits = jax.jit(lambda tokens: model.nnx.merge(graph, params)(tokens))
    tokens = jnp.arange(16)[None]
    changed = logits(tokens.at[0, 9].set(200)) != logits(tokens)
    np.testing.assert_array_equal(changed.any(-1)[0], np.arange(16) >= 9)


def test_all_sides_start_from_the_same_weights():
    start = training.initial_weights(SMALL, 0)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), start)
    made = {name: sides.sides(SMALL)[name]() for name in ("Optax, bf16 weights", sides.LEAN, sides.INT8)}
    held = {name: jax.jit(side.init)(start) for name, side in made.items()}
    equal = lambda tree, expected: jax.tree.map(np.testing.assert_array_equal, tree, expected)
    equal(held["Optax, bf16 weights"][0], rounded)
    equal(jax.jit(jadam.float32_params)(*held[sides.LEAN]), start)
    equal(held[sides.INT8][0], start)


def test_matrices_decay():
    decayed = sides.is_decayed(model.shapes(SMALL))
    assert decayed["wte"] == decayed["wpe"] == {"embedding": True}
    assert decayed["blocks"]["qkv"] == {"kernel": True, "bias": False}
    assert decayed["ln_f"] == {"scale": False, "bias": False}


# ---------------------------------------------------------------- the run


class Killed(BaseException):
    """In the place of a signal."""


def test_the_whole_run_and_one_that_is_killed(tmp_path, monkeypatch, capsys):
    only(monkeypatch, FEW)
    given = options(tmp_path)
    read = lambda: json.loads(given.out.read_text())
    training.run(given)
    whole = read()
    assert whole["complete"]
    assert whole["steps"] == 6
    assert {name: list(x["runs"]) for name, x in whole["sides"].items()} == {name: ["0", "1"] for name in FEW}
    reference, lean = whole["sides"][sides.REFERENCE], whole["sides"][sides.LEAN]
    assert reference["over float32"] == [1, 1]
    assert lean["mean over float32"] == pytest.approx(np.mean(lean["over float32"]), abs=1e-5)  # rounded to 5 digits
    for entry in whole["sides"].values():
        assert entry["step, arguments"] == entry["plan"]
        assert entry["optimizer's share"] > 0
        for run in entry["runs"].values():
            assert len(run["curve"]) == 3
            assert run["curve"][-1] < run["curve"][0] < 1.01 * math.log(256)  # a uniform guess, at first
    # weights and remainders in bfloat16 and int16, codes of 2 bytes and 2 scales of 4 bytes in 64; vectors are float32
    matrices = 64 * (256 + 4 * 64 + 8 * 64)
    assert (
        lean["parameters"] * 4 + matrices * (2 + 8 / 64) < lean["weights and optimizer, bytes"] < lean["parameters"] * 7
    )
    assert given.out.with_suffix(".png").exists()
    assert not list(text.cache().glob("result-*/*/*"))  # no checkpoint is left

    save, saves = checkpoint.Checkpoint.save, 0

    def save_and_stop(self, chunk, tree):
        save(self, chunk, tree)
        nonlocal saves
        saves += 1
        if saves == 3:  # two of the first training
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(training, "SAVE_SECONDS", 0)
        patched.setattr(checkpoint.Checkpoint, "save", save_and_stop)
        with pytest.raises(Killed):
            training.run(given)  # begins anew, as the last run is complete
    assert "resumes" not in capsys.readouterr().out
    assert not read()["complete"]
    training.run(given)
    assert "train: resumes " in capsys.readouterr().out
    losses = lambda result: [
        (x["loss"], x["curve"]) for side in result["sides"].values() for x in side["runs"].values()
    ]
    assert losses(read()) == losses(whole)


@pytest.mark.parametrize(
    ("left", "steps"),
    [
        (1e4, 6),  # all
        (12.0, 4),  # 85 % of it are 10.2 s: two chunks of 5 s
        (11.0, None),
    ],
)
def test_fewer_steps_where_time_is_short(left, steps, tmp_path, monkeypatch):
    bench = training.Training(options(tmp_path, minutes=1.0), jax.devices()[0])
    monkeypatch.setattr(bench, "left", lambda: left)
    if steps:
        assert training.choose_steps(bench, [1.0, 2.0, 2.0]) == steps
        return
    monkeypatch.setattr(training.time, "monotonic", lambda: bench.began + 60)
    with pytest.raises(SystemExit, match=r"train: 1 minutes are too short on this device; try --minutes 1.2"):
        training.choose_steps(bench, [1.0, 2.0, 2.0])  # a minute so far, and 2 * 5 / 0.85 seconds


def test_what_does_not_fit_is_named_and_goes_on(tmp_path, monkeypatch, capsys):
    """The time ends after two of three chunks of the first training."""
    only(monkeypatch, FEW[:1])
    given = options(tmp_path, quick=True)
    quick = SMALL._replace(quick_steps=6)
    monkeypatch.setitem(model.SIZES, "tiny", quick)
    made = training.prepare

    def prepare_and_stop(bench, every):
        found = made(bench, every)
        if stops:
            bench.left = lambda: stops.pop()
        return found

    monkeypatch.setattr(training, "prepare", prepare_and_stop)
    stops = [0.0, 1e9, 1e9, 1e9, 1e9]  # the last first: for the number of steps, the training, its chunks
    training.run(given)
    assert "left out, out of time: Optax, float32, seed 0" in capsys.readouterr().out
    assert not given.out.exists()  # no training has ended
    (kept,) = text.cache().glob("result-*/*/*")
    assert [x.name for x in kept.iterdir()] == ["2"]
    training.run(given)
    assert "train: Optax, float32, seed 0: goes on after step 4" in capsys.readouterr().out
    assert json.loads(given.out.read_text())["complete"]
    assert not list(text.cache().glob("result-*/*/*"))


def test_without_a_gpu_gpt2_is_skipped(tmp_path, capsys):
    assert training.run(options(tmp_path, size="gpt2")) == {}
    assert capsys.readouterr().out.startswith("train: skipped, GPT-2 small needs a GPU")


def test_a_side_that_fails_is_named(tmp_path, monkeypatch, capsys):
    def fails():
        raise RuntimeError("first line\nsecond line")

    def missing():
        raise ImportError("no such package")

    monkeypatch.setattr(training, "sides", lambda *_: {"fails": fails, "missing": missing})
    with pytest.raises(SystemExit, match="train: 1 sides failed: fails"):
        training.run(options(tmp_path))
    out = capsys.readouterr().out
    assert "train: fails failed: RuntimeError: first line" in out
    assert "train: missing left out: ImportError: no such package" in out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore's, for a damaged index
def test_a_damaged_checkpoint_is_not_used(tmp_path, capsys):
    trees = [{"w": jnp.full((64, 64), float(i))} for i in range(3)]
    with checkpoint.Checkpoint(tmp_path / "run") as saved:
        assert saved.restore(trees[0]) == (0, trees[0])
        for i in (1, 2):
            saved.save(i, trees[i])
    data = max((saved.folder / "2" / "default" / "d").iterdir(), key=lambda x: x.stat().st_size)
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 1
    data.write_bytes(contents)
    with checkpoint.Checkpoint(tmp_path / "run") as saved:
        done, tree = saved.restore(trees[0])
    assert (done, tree["w"][0, 0]) == (1, 1)
    assert "checkpoint 2 in " in capsys.readouterr().out


PROGRAM = """if True:
    import sys
    from benchmarks import __main__
    from benchmarks.train import model, sides, training

    model.SIZES["tiny"] = model.SIZES["tiny"]._replace(
        layers=1, context=16, batch=4, steps=40, chunk=2, seeds=1
    )
    every = sides.sides
    training.sides = lambda *given: {sides.INT8: every(*given)[sides.INT8]}
    training.SAVE_SECONDS = 0
    sys.exit(__main__.main())
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    def start(name, folder):
        command = [sys.executable, "-c", PROGRAM, "train", "--size", "tiny", "--out", str(tmp_path / name)]
        env = subprocess_env() | {"XDG_CACHE_HOME": str(tmp_path / folder)}
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def results(name):
        return {side: x["runs"] for side, x in json.loads((tmp_path / name).read_text())["sides"].items()}

    whole = start("whole.json", "a")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    killed = start("killed.json", "b")
    while killed.poll() is None:
        saved = (tmp_path / "b" / "jadam" / "train").glob("killed-*/*/*/*")
        if any(x.name.isdigit() and int(x.name) >= 8 for x in saved):  # of 20 chunks
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL
    resumed = start("killed.json", "b")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert "train: jadam, int8, seed 0: goes on after step " in output
    losses = lambda name: [(x["loss"], x["curve"]) for runs in results(name).values() for x in runs.values()]
    assert losses("killed.json") == losses("whole.json")


# ---------------------------------------------------------------- report


def test_a_peak_below_an_earlier_one_is_hidden(tmp_path, monkeypatch):
    bench = training.Training(options(tmp_path), jax.devices()[0])
    bench.train_text, bench.result = np.zeros(100, np.uint8), {"sides": {}}
    sizes, peaks = {"a": 3, "b": 1, "c": 2}, [5, 20, 20, 30]  # before, then of b, c and a
    programs = lambda side, *_: SimpleNamespace(facts={"training, bytes by the compiler": sizes[side]})
    monkeypatch.setattr(training, "Programs", programs)
    monkeypatch.setattr(training, "measure", lambda *_: ({}, 1.0))
    monkeypatch.setattr(training, "peak", lambda _: peaks.pop(0))
    made = training.prepare(bench, {name: lambda name=name: name for name in sizes})
    assert list(made) == ["a", "b", "c"]
    found = {name: x["peak on the device, bytes"] for name, x in bench.result["sides"].items()}
    assert found == {"b": 20, "c": None, "a": 30}


def test_capability(monkeypatch):
    device = lambda capability: SimpleNamespace(platform="gpu", compute_capability=capability)
    assert "needs a GPU" in training.why_not("gpt2", jax.devices("cpu")[0])
    assert "8.0, and this GPU has 7.5" in training.why_not("gpt2", device("7.5"))
    for size, capability in (("gpt2", "9.0"), ("gpt2", "12.0"), ("gpt2", "gfx942"), ("tiny", "7.5")):
        assert training.why_not(size, device(capability)) is None


@pytest.mark.parametrize(("arguments", "temporaries"), [(103, 0), (100, 2**16 + 1)])
def test_compiled_bytes_that_are_not_planned(arguments, temporaries, monkeypatch):
    row = {"side": sides.INT8, "parameters": 1000, "plan": 100, "training, bytes by the compiler": None}
    row |= {"step, arguments": arguments, "step, temporaries": temporaries}
    monkeypatch.setattr(aot, "run_in_environment", lambda *_, **__: [row])
    with pytest.raises(SystemExit, match="train: bars missed: jadam, int8: "):
        aot.run(SimpleNamespace(size="tiny", quick=False))
