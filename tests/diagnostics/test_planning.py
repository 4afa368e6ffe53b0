"""`jadam.plan` and ``jadam plan`` report the bytes of real states on a real mesh."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CPU, parametrize
from jax.sharding import Mesh
from safetensors.numpy import save_file

import jadam
from jadam._cli.command_line import main
from jadam._diagnostics import plan as planning

COUNTS = {
    "gpt2": 124_439_808,
    "llama-7b": 6_738_415_616,
    "llama-70b": 68_976_648_192,
}  # of the published models


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_models(name):
    assert sum(x.size for x in jax.tree.leaves(planning.shapes_of(name))) == COUNTS[name]


@pytest.mark.parametrize("how", planning.CONFIGURATIONS)
@pytest.mark.parametrize("params_axis", [None, "model"])
def test_plan_matches_real_arrays(how, params_axis):
    """Planned bytes equal those on the first device of a 4 x 2 mesh."""
    dtype, tx = planning.CONFIGURATIONS[how]
    shapes = {"a": (257, 768), "b": [(128, 300), (24,)], "c": (3,)}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))
    planned = jadam.plan(tx, shapes, {"data": 4, "model": 2}, "data", params_axis)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    placed = jadam.sharding.shard_largest_dim(shapes, mesh, params_axis)
    params = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), placed)
    here = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    state = jadam.sharding.zero1(tx, params, mesh, "data").init(params)
    assert planned.parameters == here(params) == planned.gradients
    assert planned.state == here(state)
    assert planned.remainders == (here(state.remainder) if "exact" in how else 0)
    assert planned.total == 2 * planned.parameters + planned.state
    assert "['c']: state not sharded: no dimension of (3,) is a multiple of 4" in str(planned)


PLACEMENTS = {  # format, mesh, axis of the state, axes of the parameters
    "one device, int8": ("int8", {"data": 1}, "data", None),
    "FSDP, exact_bf16": ("bfloat16 + exact_bf16", {"fsdp": 8}, "fsdp", "fsdp"),
    "FSDP x TP, int8": ("int8", {"fsdp": 4, "tensor": 2}, "fsdp", ("fsdp", "tensor")),
    "zero1": ("float32", {"data": 8}, "data", None),
    "zero1 x TP, int8": ("int8", {"data": 4, "model": 2}, "data", "model"),
    "zero1, int8, exact_bf16": ("int8 + exact_bf16", {"data": 8}, "data", None),
}


@parametrize("name", [*PLACEMENTS], default=["FSDP, exact_bf16", "FSDP x TP, int8", "zero1"], slow=["one device, int8"])
def test_plan_is_what_xla_counts(name):
    """The bytes of a donated step's arguments, and its temporaries, as the compiler has them. A CPU pads nothing."""
    how, mesh_shape, axis, params_axis = PLACEMENTS[name]
    dtype, tx = planning.CONFIGURATIONS[how]
    shapes = {"embed": (1001, 768), "kernels": [(256, 1024), (1024, 256)], "bias": (1024,), "scale": (3,)}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))
    planned = jadam.plan(tx, shapes, mesh_shape, axis, params_axis)
    mesh = Mesh(np.array(jax.devices()[: planned.devices]).reshape([*mesh_shape.values()]), [*mesh_shape])
    params = jadam.sharding.shard_largest_dim(shapes, mesh, params_axis)
    if planned.devices == 1:
        state = jax.eval_shape(tx.init, params)
    else:
        tx = jadam.sharding.zero1(tx, params, mesh, axis)
        state = tx.layout.state
    step = jax.jit(lambda params, state, grads: jadam.step(tx, grads, state, params), donate_argnums=(0, 1))
    memory = step.lower(params, state, params).compile().memory_analysis()
    assert memory.argument_size_in_bytes == planned.total
    assert memory.alias_size_in_bytes == planned.parameters + planned.state  # all that was donated is reused
    assert bool(planned.gathered) == ("zero1" in name)
    if CPU.kernel is not None:  # else XLA takes several passes; scalars and the kernel's results' table are < 4 KiB
        assert memory.temp_size_in_bytes <= 4096 + 2 * planned.gathered  # XLA gathers bfloat16 as float32 on a CPU


def test_gpt2_embedding_in_int8_on_eight_devices():
    """The embedding, a third of the model, has odd rows of six blocks of 128, which become eight of 96."""
    planned = jadam.plan(jadam.adamw(1e-3, moments="int8"), planning.shapes_of("gpt2"), {"data": 8}, "data")
    assert not planned.notes
    assert planned.state * 8 / planned.num_parameters < 2.1


def test_notes_on_moments_kept_in_float32():
    shapes = {"w": jax.ShapeDtypeStruct((101, 768), jnp.float32), "v": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    planned = jadam.plan(jadam.adamw(1e-3, moments="int8"), shapes, {"data": 2, "model": 64}, "data", "model")
    assert "['w']: moments in float32: its own sharding cuts its last dimension into shards of 12" in str(planned)


@pytest.mark.parametrize(("model", "n"), [("llama-7b", 8), pytest.param("llama-70b", 64, marks=pytest.mark.slow)])
def test_command_line(model, n, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "--model", model, "--mesh", f"data=4,model={n}", "--params-axis", "model"]) == 0
    out = capsys.readouterr().out
    assert f"{COUNTS[model]:,} parameters on {4 * n} devices" in out
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := re.split("  +", line.strip())) == 7}
    # on one device a parameter has 8 bytes of float32 moments, or 2 bytes of remainder
    gib = COUNTS[model] / (4 * n) / 2**30
    assert [float(x) for x in rows["float32"]][2] == pytest.approx(8 * gib, abs=0.005)
    assert [float(x) for x in rows["int8 + exact_bf16"]][3] == pytest.approx(2 * gib, abs=0.005)
    assert (tmp_path / "jadam-plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table_and_no_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("matplotlib.figure", "rich", "rich.console"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["plan"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table if line] == [
        f"gpt2 with AdamW: {COUNTS['gpt2']:,} parameters on 8 devices (data=8)",
        "GiB per device; bytes/param is of the optimizer's state",
        "format",
        *planning.CONFIGURATIONS,
        "Temporaries of jadam.step itself: up to 0.74 GiB, as it gathers weights",
    ]
    assert last == "No plot written: matplotlib is not installed; run: pip install matplotlib"
    assert main(["plan", "--out", "plot.png"]) == 2
    assert capsys.readouterr().err.endswith("error: --out: matplotlib is not installed; run: pip install matplotlib\n")
    assert list(tmp_path.iterdir()) == []


# -- models of one's own, on meshes of one's own -----------------------------------------------------------------------

WEIGHTS = {"dense.weight": (64, 128), "dense.bias": (64,), "steps": ()}


def planned(arguments, capsys):
    """What ``jadam plan`` prints, and the cells of its rows by their first."""
    assert main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    return out, {cells[0]: cells[1:] for line in out.splitlines() if len(cells := re.split("  +", line.strip())) > 5}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # no plots
    return tmp_path


def make_source(kind, folder):
    """Writes the shapes `WEIGHTS` as ``kind`` into the working folder, and returns what names them."""
    arrays = {name: np.zeros(shape, np.float16) for name, shape in WEIGHTS.items()}
    if kind == "safetensors":
        save_file(arrays, folder / "model.safetensors")
        return "model.safetensors"
    if kind == "index":
        names = {"dense.weight": "a.safetensors", "dense.bias": "b.safetensors", "steps": "b.safetensors"}
        for file in ("a.safetensors", "b.safetensors"):
            save_file({name: x for name, x in arrays.items() if names[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return "model.safetensors.index.json"
    if kind == "json":
        (folder / "shapes.json").write_text(json.dumps({"dense": [[64, 128], [64]], "steps": []}))
        return "shapes.json"
    bodies = {
        "function": "    return {'dense': [jnp.zeros((64, 128)), jnp.zeros(64)], 'steps': jnp.zeros(())}",
        "nnx": "    from flax import nnx\n    return nnx.Linear(64, 128, rngs=nnx.Rngs(0))",
    }
    (folder / f"model_{kind}.py").write_text(f"import jax.numpy as jnp\ndef make():\n{bodies[kind]}\n")
    return f"model_{kind}:make"


@pytest.mark.parametrize("kind", ["safetensors", "index", "json", "function", "nnx"])
def test_shapes(kind, folder, capsys):
    source = make_source(kind, folder)
    out, rows = planned(["--shapes", source, "--mesh", "data=1"], capsys)
    n = 64 * 128 + (128 if kind == "nnx" else 64 + 1)
    assert out.startswith(f"{source} with AdamW: {n:,} parameters on 1 device (data=1)\nKiB per device")
    assert float(rows["float32"][0]) == pytest.approx(4 * n / 1024, abs=0.005)  # weights
    assert float(rows["float32"][2]) == pytest.approx(8 * n / 1024, abs=0.005)  # moments


def test_fsdp_by_its_name(folder, capsys):
    """Parameters, gradients and state are on one of 64 devices each."""
    out, rows = planned(["--model", "llama-7b", "--mesh", "fsdp=64"], capsys)
    assert "Temporaries of jadam.step itself: none, where it is one pass\n" in out
    gib = COUNTS["llama-7b"] / 64 / 2**30
    assert [float(x) for x in rows["float32"][:3]] == pytest.approx([4 * gib, 4 * gib, 8 * gib], abs=0.01)
    _, both = planned(["--model", "llama-7b", "--mesh", "fsdp=16,tensor=4", "--params-axis", "fsdp,tensor"], capsys)
    assert both["float32"][:2] == rows["float32"][:2]


def test_what_fits(folder, capsys):
    out, _ = planned(["--model", "llama-7b", "--mesh", "fsdp=4", "--memory", "20"], capsys)
    # 7 billion parameters on 4 devices: 25.1 GiB with 16 bytes each, 18.8 with 12, 15.7 with 10, 15.7, 12.6
    assert out.splitlines()[-2] == (
        "Fit into 20 GiB, besides activations: bfloat16, int8, bfloat16 + exact_bf16, int8 + exact_bf16"
    )
    out, _ = planned(["--model", "llama-7b", "--mesh", "fsdp=4", "--memory", "5"], capsys)
    assert "Fit into 5 GiB, besides activations: none" in out


def failed(arguments, capsys):
    """The one line of error."""
    assert main(["plan", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("jadam plan: error: ")


def test_errors_of_shapes(folder, capsys):
    (folder / "cut.safetensors").write_bytes(b"12345678")
    (folder / "no.json").write_text("{")
    (folder / "text.json").write_text('{"kernel": "64"}')
    (folder / "empty.json").write_text("{}")
    (folder / "index.json").write_text('{"weight_map": {"w": "absent.safetensors"}}')
    (folder / "broken.py").write_text("def make():\n    raise KeyError('width')\n")
    for source, error in {
        "absent.safetensors": "cannot read absent.safetensors: No such file or directory",
        "index.json": "cannot read index.json: No such file or directory",
        "cut.safetensors": "cut.safetensors is not a whole safetensors file: ",
        "no.json": "no.json is not JSON: ",
        "text.json": "text.json must have lists of sizes, such as {'kernel': [64, 128]}, got '64'",
        "empty.json": "no parameters are in 'empty.json'",
        "llama": "must be a .safetensors or .json file or module:function, got 'llama'",
        "absent:make": "absent:make raised ModuleNotFoundError: No module named 'absent'",
        "broken:make": "broken:make raised KeyError: 'width'",
    }.items():
        assert failed(["--shapes", source], capsys).startswith(f"--shapes: {error}")
