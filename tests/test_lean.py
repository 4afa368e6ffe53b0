"""The benchmark `lean` with few steps: int8 moments and bf16 weights reach the loss of float32."""

import importlib.util

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def lean():
    """The benchmark's module; imported late, as it loads matplotlib and scikit-learn."""
    spec = importlib.util.spec_from_file_location("lean", ROOT / "benchmarks" / "lean.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def over_float32(lean, problem, rate):
    losses = {name: result["loss"] for name, result in lean.compare(problem, rate, lean.SIDES).items()}
    return {name: loss / losses["float32"] for name, loss in losses.items()}


@pytest.mark.slow
def test_digits(lean):
    ratios = over_float32(lean, lean.digits(1000), 1e-4)
    assert ratios.pop("optax on bf16 weights") > 1.2  # the error that exact_bf16 avoids
    # the benchmark's bars are 1.05 for bf16 weights and 1.10 for int8, but after 4,000 steps
    assert all(0.98 < ratio < 1.02 for ratio in ratios.values()), ratios


@pytest.mark.nightly
def test_transformer(lean):
    ratios = over_float32(lean, lean.text(40), 1e-3)
    assert ratios.pop("optax on bf16 weights") > 1.003
    assert all(0.997 < ratio < 1.003 for ratio in ratios.values()), ratios


def test_a_side_that_diverges_is_seen(lean):
    rows = lean.rows(
        "digits", 1.0, [{"float32": {"loss": 1.0, "curve": [1.0]}, "x": {"loss": float("nan"), "curve": [1]}}]
    )
    assert [row["mean_over_float32"] for row in rows] == [1.0, None]
