"""States of version 1, the first layout of int8 moments, are converted or refused, and never misread.

The files in ``version1`` were written by the code of that version: by `numpy.savez`, Orbax and pickle.
"""

import functools
import pickle
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from golden import cases, where
from helpers import assert_equal

import jadam
from jadam import torch_state

FOLDER = Path(__file__).parent / "version1"
CASES = {"adam-int8": "adam, int8", "by_path-int8": "by_path, int8", "exact_bf16-int8": "exact_bf16, int8"}


def start(name):
    """The transformation, its parameters, and a template: its state with the version of the file."""
    with np.load(Path(cases.__file__).parent / "trajectories.npz") as file:
        params, _ = cases.inputs(cases.CASES[CASES[name]], file)
    tx = cases.CASES[CASES[name]].make()
    is_quantized = lambda x: hasattr(x, "mu_scale")
    of_version_1 = lambda x: x._replace(version=jnp.zeros(1, jnp.int8)) if is_quantized(x) else x
    return tx, params, jax.tree.map(of_version_1, tx.init(params), is_leaf=is_quantized)


def from_npz(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return where.unnamed(file, start(name)[2])


def from_orbax(name, template=None):
    with ocp.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sharding info not provided")  # older Orbax, without a template
        template = template and jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        return checkpointer.restore(FOLDER / name, template)


def quantized(state):
    """The part of a state with codes."""
    is_quantized = lambda x: hasattr(x, "mu_scale")
    (found,) = filter(is_quantized, jax.tree.leaves(state, is_leaf=is_quantized))
    return found


def decoded(codes):
    """m and v of "k" in float64, by the formulas of version 1. Its rows have a block of 128 elements and one of 44."""
    rq, sq, r_scale, s_scale = (np.asarray(x["k"], np.float64) for x in codes)
    blocks = np.arange(rq.shape[-1]) // 128
    s = s_scale[:, blocks] * (sq / 255) ** 4
    return r_scale[:, blocks] * np.sign(rq) * (rq / 127) ** 2 * s, s**2


@pytest.mark.parametrize("name", CASES)
def test_converted_to_float32(name):
    """At most 17 roundings of float32: 8 of the root of v, which is squared."""
    old = quantized(from_npz(name))
    m, v = decoded((old.mu, old.nu, old.mu_scale, old.nu_scale))
    state = jadam.convert_moments(from_npz(name), "float32")
    mu, nu = (optax.tree.get(state, field)["k"] for field in ("mu", "nu"))
    np.testing.assert_allclose(mu, m, rtol=17 * 2**-24)
    np.testing.assert_allclose(nu, v, rtol=17 * 2**-24)


@pytest.mark.parametrize("name", CASES)
def test_converted_to_int8(name):
    """Training goes on, and the moments are within a level of what they were."""
    tx, params, _ = start(name)
    state = jadam.convert_moments(from_npz(name), "int8")
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
    ratios = []
    for x in (from_npz(name), state):
        m, v = (optax.tree.get(jadam.convert_moments(x, "float32"), field)["k"] for field in ("mu", "nu"))
        ratios.append(np.where(v > 0, m / np.sqrt(np.where(v > 0, v, 1)), 0))
    # levels of r are at most 1/16 / 5.9375 of the largest apart, which is below 7.27 with these decay rates
    np.testing.assert_allclose(*ratios, rtol=0, atol=7.27 / 16 / 5.9375)
    jadam.step(tx, params, state, params)


@pytest.mark.parametrize("name", CASES)
def test_refused_where_it_would_be_misread(name):
    tx, params, _ = start(name)
    state = from_npz(name)
    error = r"state.version must be 2, got 1: a QuantizedAdamState saved by another version of jadam. Convert it: "
    for use in (
        lambda: jadam.step(tx, params, state, params),
        lambda: tx.update(params, state, params),
        lambda: jadam.statistics(tx, state, params),
        lambda: torch_state.to_torch(state, {f"['{name}']": name for name in params}),
    ):
        with pytest.raises(ValueError, match=error):
            use()


@pytest.mark.parametrize("name", CASES)
def test_orbax(name):
    """With a template of version 1 it is read, without one it is no state."""
    template = start(name)[2]
    assert_equal(jax.tree.map(np.asarray, from_orbax(name, template)), jax.tree.map(np.asarray, from_npz(name)))
    without_template = "Pass the state that init returns, or a checkpoint restored into it"
    older_orbax = "was not found in jax.local_devices"  # where it reads a newer one's file
    with pytest.raises(ValueError, match=f"{without_template}|{older_orbax}"):
        jadam.convert_moments(from_orbax(name), "int8")


def test_pickle():
    with open(FOLDER / "adam-int8.pickle", "rb") as file:
        state = pickle.load(file)
    assert_equal(state, jax.tree.map(np.asarray, from_npz("adam-int8")))
    assert_equal(jadam.convert_moments(state, "int8"), jadam.convert_moments(from_npz("adam-int8"), "int8"))


def test_a_padded_version_is_refused():
    """Orbax pads the version with zeros if the template is today's and ``strict`` is False."""
    tx, params, _ = start("adam-int8")
    padded = lambda x: x._replace(version=np.zeros(2, np.int8)) if hasattr(x, "mu_scale") else x
    state = jax.tree.map(padded, from_npz("adam-int8"), is_leaf=lambda x: hasattr(x, "mu_scale"))
    error = "state.version must be 2, got an older version that was padded to its length"
    for use in (lambda: tx.update(params, state, params), lambda: jadam.convert_moments(state, "int8")):
        with pytest.raises(ValueError, match=error):
            use()
    jitted = jax.jit(functools.partial(jadam.step, tx))
    assert np.isnan(jitted(params, state, params)[0]["k"]).all()
    assert np.isfinite(jitted(params, tx.init(params), params)[0]["k"]).all()
