"""`jadam.plan` and ``jadam plan`` report the bytes of real states on a real mesh."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

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
    ]
    assert last == "No plot written: matplotlib is not installed; run: pip install matplotlib"
    assert main(["plan", "--out", "plot.png"]) == 2
    assert capsys.readouterr().err.endswith("error: --out: matplotlib is not installed; run: pip install matplotlib\n")
    assert list(tmp_path.iterdir()) == []
