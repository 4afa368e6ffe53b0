"""The benchmark `fits`: the largest model fits and the next does not, and a compiled step takes the planned bytes."""

import sys
from types import SimpleNamespace

import jax
import pytest
from helpers import ROOT, parametrize

sys.path.append(str(ROOT))  # behind an installed jadam

from benchmarks import fits

SMALL = [fits.Model(64, layers) for layers in range(1, 13)]


@pytest.mark.parametrize("name", ["float32", "int8 + exact_bf16"])
def test_the_largest_model_fits_and_the_next_one_does_not(name):
    model = fits.largest(name, 16 * fits.GIB)
    after = fits.FAMILY[fits.FAMILY.index(model) + 1]
    assert model.parameters < after.parameters
    assert fits.plan(name, model).total <= 16 * fits.GIB < fits.plan(name, after).total
    # bytes of a parameter: 16 in float32; else 2 for weight, gradient and remainder each, and more than 2 of moments
    assert model.parameters < 16 * fits.GIB / (16 if name == "float32" else 8)


def test_the_models_are_a_family():
    parameters = [model.parameters for model in fits.FAMILY]
    assert parameters == sorted(set(parameters))
    assert all(model.width % 64 == 0 and 64 <= model.width / model.layers <= 128 for model in fits.FAMILY)
    for model in (fits.Model(768, 12), fits.FAMILY[0]):
        assert model.parameters == fits.plan("float32", model).num_parameters
    assert fits.Model(768, 12).parameters == 124_439_808  # GPT-2, as published


@pytest.mark.parametrize("nbytes", [2**20, 2**40])
def test_memory_that_no_model_of_the_family_fills(nbytes, monkeypatch):
    monkeypatch.setattr(fits, "FAMILY", SMALL)
    with pytest.raises(ValueError, match=r"nbytes must be from \S+ to \S+ GiB for int8, got \S+ GiB; widen the range"):
        fits.largest("int8", nbytes)


@parametrize("name", [*fits.FORMATS], default=["float32", "int8 + exact_bf16", "Optax, bf16 weights"])
def test_compiled_arguments_are_as_planned(name):
    model = fits.Model(128, 2)
    row = fits.describe(name, model, fits.compile_step(name, model))
    assert row["arguments"] == row["planned"] == fits.plan(name, model).total


class Device:
    """A small GPU. JAX may use 95 % of its memory."""

    platform, device_kind = "gpu", "a small card"

    def __init__(self, mib=100):
        self.mib = mib

    def memory_stats(self):
        return {"bytes_limit": 0.95 * self.mib * 2**20, "peak_bytes_in_use": 123}


@pytest.mark.parametrize(("name", "mib"), [("float32", 60), ("int8 + exact_bf16", 30)])
def test_a_step_with_the_largest_model_for_a_card(name, mib, monkeypatch):
    monkeypatch.setattr(fits, "FAMILY", SMALL)
    monkeypatch.setattr(jax, "devices", lambda: [Device(mib)])
    row = fits.take_step_on_gpu(name)
    bigger = fits.Model(64, row["layers"] + 1)
    assert row["planned"] <= 0.9 * mib * 2**20 < fits.plan(name, bigger).total
    assert row["peak"] == 123


def test_the_table_of_peaks(monkeypatch, capsys):
    rows = {name: {"parameters": 10**9, "planned": 100, "peak": 101} for name in fits.FORMATS}
    rows["int8"] = {"error": "RuntimeError: no memory"}
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(fits, "in_fresh_process", rows.get)
    assert fits.on_gpu() == {"card": "a small card", "steps": rows}
    out = capsys.readouterr().out
    assert "fits: int8 failed: RuntimeError: no memory" in out
    assert out.count("1.0100") == len(fits.FORMATS) - 1


def test_a_process_that_fails_reports_its_error(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    row = fits.in_fresh_process("float32")  # on a CPU, which has no memory statistics
    assert row["error"].startswith("TypeError: ")


def test_without_a_gpu_no_step_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(fits, "FAMILY", SMALL)
    monkeypatch.setattr(fits, "MEMORY", (0.034,))
    monkeypatch.setattr(fits, "FORMATS", {"int8": fits.FORMATS["int8"]})
    assert fits.run(SimpleNamespace(quick=True)) == {}
    out = capsys.readouterr().out
    assert "fits: the arguments of all 1 steps are as planned" in out
    assert "fits: no step taken: " in out
