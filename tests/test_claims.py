"""The benchmark `claims`: its rules on synthetic results, its grid search, and a short run."""

import json
import sys

import numpy as np
import pytest
from helpers import ROOT

sys.path.append(str(ROOT))  # behind an installed jadam

from benchmarks import claims, training

SIDES = list(claims.SIDES)
FEW = claims.QUICK


def side(loss, width=1.0):
    """A result of `claims.measure` for one optimizer: three seeds with about this final loss."""
    losses = [0.999 * loss, loss, 1.001 * loss]
    grid = {"log10_rate": [-1.0, 0.0, 1.0], "loss": [None, loss, 2 * loss]}
    return {
        "variant": "",
        "log10_rate": 0.0,
        "loss": losses,
        "test_error": [0.1] * 3,
        "curves": [[2 * x, x] for x in losses],
        "width": width,
        "grid": grid | {"low": grid["loss"], "high": grid["loss"]},
    }


def problem(adam=1.0, rivals=2.0, adam_width=1.0, rivals_width=0.5):
    sides = {name: side(rivals, rivals_width) for name in SIDES} | {"Adam": side(adam, adam_width)}
    return {"steps": 10, "sides": sides}


def problems(**changed):
    return {name: problem() for name in claims.TITLES} | {"mnist_one_cycle": problem(0.5, 1.5)} | changed


def rescaled(adam_differs=0, sgd_rescaled=2.0):
    plain = {"log10_rate": 0.0, "loss": [1.0] * 3, "curves": [[2.0, 1.0]] * 3}
    sgd = plain | {"loss": [sgd_rescaled] * 3}
    count = {"weights": 9}
    return {
        "steps": 10,
        "sides": {
            "Adam": count | {"weights_that_differ": adam_differs, "plain": plain, "rescaled": plain},
            "SGD": count | {"weights_that_differ": 9, "plain": plain, "rescaled": sgd},
        },
    }


def bias(with_few=((1.0, 5.0),), without_few=((2.0, None),), betas=((0.9, 0.999),)):
    cell = {"with": {"few": with_few, "more": with_few}, "without": {"few": without_few, "more": without_few}}
    cells = [{"b1": b1, "b2": b2, **cell} for b1, b2 in betas]
    return {"steps": {"few": 2, "more": 10}, "log10_rate": [-2.0, -1.0], "cells": cells}


def test_verdict_holds():
    judged = claims.verdicts(problems(), rescaled(), bias())
    assert [claim["verdict"] for claim in judged.values()] == [claims.HOLDS] * 6


worse, none_wider = problem(2.0, 1.0), problem(adam_width=0.1)


@pytest.mark.parametrize(
    ("judge", "partly", "fails"),
    [
        (
            claims.faster,
            problems(reviews=worse),
            problems(reviews=worse, mnist_logistic=worse, mnist_wide_network=worse),
        ),
        (
            claims.less_tuning,
            problems(reviews=none_wider),
            problems(reviews=none_wider, mnist_logistic=none_wider, mnist_network=none_wider),
        ),
        (claims.sparse_and_noisy, problems(reviews=worse), problems(reviews=worse, mnist_wrong_labels=worse)),
        (claims.invariant, rescaled(sgd_rescaled=1.0), rescaled(adam_differs=1)),
        (claims.corrected, bias(((1.0, 5.0),), ((2.0, 4.0),)), bias(((3.0, 5.0),), ((2.0, 6.0),))),
        (
            claims.with_one_cycle,
            problems(mnist_one_cycle=problem(0.9, 0.8)),
            problems(mnist_one_cycle=problem(1.0, 2.0)),
        ),
    ],
)
def test_verdicts_partly_and_fails(judge, partly, fails):
    assert [judge(result)["verdict"] for result in (partly, fails)] == [claims.PARTLY, claims.FAILS]


def test_divergence():
    stable = claims.corrected(bias())["largest_log10_rate_without_divergence"]
    assert stable == {"b1 0.9, b2 0.999": {"with": -1.0, "without": -2.0}}
    none = claims.corrected(bias(without_few=((None, None),)))["largest_log10_rate_without_divergence"]
    assert none == {"b1 0.9, b2 0.999": {"with": -1.0, "without": None}}


def test_order_needs_one_percent_for_every_seed():
    assert claims.order([1.0, 1.0], [1.02, 1.02]) == "better"
    assert claims.order([1.02, 1.02], [1.0, 1.0]) == "worse"
    assert claims.order([1.0, 1.0], [1.02, 1.0]) == "equal"
    assert claims.order([1.02, 1.0], [1.0, 1.0]) == "equal"
    assert claims.order([1.0, 1.0], [None, None]) == "better"
    assert claims.order([None], [None]) == "equal"


def test_sooner_is_the_share_of_the_steps():
    assert claims.sooner([[4.0, 2.0, 1.0, 0.5]], [[8.0, 4.0, 3.0, 2.0]]) == 0.5
    assert claims.sooner([[4.0, None]], [[2.0, 1.0]]) is None


def test_the_grid_grows_until_its_ends_are_bad():
    def train(rates, seeds):  # a parabola over log10, best at 10**2
        losses = 1 + (np.log10(rates) - 2) ** 2
        return np.broadcast_to(losses[None, :, None], (len(seeds), len(rates), 3)), np.zeros((len(seeds), len(rates)))

    exponents, losses, errors = claims.sweep(train, 0.0, 0.5, 3, 41, np.arange(2))
    np.testing.assert_array_equal(exponents, np.arange(-0.5, 2.6, 0.5))
    assert losses.shape == (2, 7, 3)
    assert errors.shape == (2, 7)
    # float32 log10 and square: some ulp, 1.2e-7, of numbers below 8
    np.testing.assert_allclose(losses[0, :, -1], 1 + (exponents - 2) ** 2, rtol=0, atol=1e-5)
    assert len(claims.sweep(train, 0.0, 0.5, 3, 3, np.arange(2))[0]) == 3


def test_good_rates_are_interpolated():
    low, high = claims.good_rates([-1, 0, 1, 2], [1.5, 1.0, 1.0, 1.1], 1.05)
    assert abs(low - -0.1) < 1e-15  # 1.05 has an error of half an ulp, 2.2e-16; the slope is 2
    assert abs(high - 1.5) < 3e-15  # 1.1 has one, too; the slope is 10
    assert claims.good_rates([0, 1], [1.0, np.inf], 1.05) == (0.0, 0.0)


def test_the_data():
    (images, labels), (test_images, test_labels) = training.digits()
    assert images.shape == (8000, 784)
    assert test_images.shape == (2000, 784)
    assert set(labels) == set(test_labels) == set(range(10))
    (table, sentiment), (test_table, test_sentiment) = training.reviews()
    assert len(table) == 8484
    assert len(test_table) == 2121
    assert table.max() == 10_000  # the padding
    # shuffled: in the sorted file the halves have one class each; 0.06 are 5 standard deviations
    assert abs(sentiment.mean() - test_sentiment.mean()) < 0.06


def test_wrong_labels_are_wrong():
    labels = np.arange(10_000) % 10
    noisy = training.wrong_labels(labels, 0.4)
    assert abs((noisy != labels).mean() - 0.4) < 0.025  # 5 standard deviations of 0.0049
    assert set(noisy) == set(range(10))
    np.testing.assert_array_equal(training.wrong_labels(labels, 0.0), labels)


def test_adam_is_invariant_to_rescaling_and_sgd_is_not(monkeypatch):
    few = [(images[:1000], labels[:1000]) for images, labels in training.digits()]
    monkeypatch.setattr(training, "digits", lambda: few)  # the data are constants of the program
    differ = {side: claims.weights_that_differ(make, 20) for side, make in claims.UNSCALED.items()}
    assert differ["Adam"] == {"weights": 7850, "weights_that_differ": 0}
    assert differ["SGD"]["weights_that_differ"] > 5000  # weights of pixels that are always 0 do not move


def fake_trainer(problem, make, *args, **kwargs):
    """A trainer without training: losses are a parabola over log10 of the rate, best at 0.1; seeds differ slightly."""

    def train(rates, seeds):
        losses = 1 + (np.log10(rates) + 1) ** 2 + 0.001 * (np.asarray(seeds)[:, None] % 3)
        return losses[..., None] * np.linspace(2.0, 1.0, 5), np.full((len(seeds), len(rates)), 0.1)

    return train


@pytest.mark.parametrize("fully", [True, False])
def test_measure(fully, monkeypatch):
    monkeypatch.setattr(training, "trainer", fake_trainer)
    task = claims.Task(lambda: None, {"": claims.constant}, 10, fully=fully)
    sides = claims.measure(task, claims.Sizes())["sides"]
    assert list(sides) == SIDES
    for x in sides.values():
        assert x["log10_rate"] == -1
        assert x["loss"] == [1.0, 1.001, 1.002]  # rounded to 4 digits
        assert x["test_error"] == [0.1] * 3
        assert np.shape(x["curves"]) == (3, 5)
        # 5 % is at sqrt(0.05 * 1.001) = 0.2237; interpolation is by chords, above the parabola, so slightly less
        assert x["width"] is None if not fully else 0.40 < x["width"] < 2 * 0.2238
    assert list(sides["RMSProp"]["other_variants"]) == ["decay 0.99"]


@pytest.mark.slow
def test_training_and_pictures(tmp_path):
    alone = FEW._replace(sides={"Adam": claims.SIDES["Adam"]})
    reviews = claims.measure(claims.tasks(alone)["reviews"], alone)
    adam = reviews["sides"]["Adam"]
    assert np.shape(adam["curves"]) == (FEW.seeds, FEW.points)
    assert all(curve[-1] < curve[0] for curve in adam["curves"])
    few = claims.bias_correction(FEW)
    (cell,) = few["cells"]
    assert np.shape(cell["with"]["few"]) == np.shape(cell["without"]["more"]) == (FEW.seeds, FEW.code_rates)
    assert cell["with"] != cell["without"]
    result = {"problems": problems(reviews=reviews), "rescaling": rescaled(), "bias_correction": few}
    claims.plot(result, tmp_path)
    names = ("bias", "faster", "noise", "one-cycle", "rescaling", "tuning")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"claims-{name}.png" for name in names]


@pytest.mark.slow
def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    done = {name: problem() for name in claims.TITLES} | {"rescaling": rescaled()}
    (tmp_path / "claims.partial.json").write_text(json.dumps({"settings": claims.fingerprint(FEW), **done}))
    monkeypatch.setattr(claims, "bias_correction", lambda sizes, tick: bias())
    monkeypatch.setattr(claims, "plot", lambda result, folder: None)
    monkeypatch.setattr(claims, "measure", lambda *_: pytest.fail("this was done"))
    result = claims.run(None, FEW, tmp_path)
    assert result["problems"] == {name: done[name] for name in claims.tasks(FEW)}
    assert list(result["claims"]) == list("123456")
    assert not list(tmp_path.iterdir())


def test_results_of_another_version_are_discarded(tmp_path, monkeypatch):
    (tmp_path / "claims.partial.json").write_text(json.dumps({"settings": "other", "mnist_logistic": problem()}))
    monkeypatch.setattr(claims, "measure", lambda *_: pytest.fail("measured again"))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        claims.run(None, FEW, tmp_path)
    assert claims.fingerprint(FEW) != claims.fingerprint(claims.Sizes())
