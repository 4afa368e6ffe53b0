"""`jadam.describe` counts every byte of a state and gives reasons for formats and for steps that are not fused."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import zeros

import jadam

PARAMS = {
    "embed": zeros((64, 128)),
    "layers": [{"kernel": zeros((128, 64), jnp.bfloat16), "bias": zeros(64)}, zeros((3, 0))],
    "scale": zeros(()),
    "none": None,
}
TRANSFORMATIONS = {
    "float32": jadam.adam(1e-3),
    "bfloat16": jadam.adamw(1e-3, moments="bfloat16"),
    "int8": jadam.adam(1e-3, moments="int8"),
    "schedules": jadam.adam(lambda count: 1e-3, lambda count: 0.9, moments="int8"),
    "optax": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "exact_bf16": jadam.exact_bf16(optax.MultiSteps(jadam.adam(1e-3, moments="int8"), 4)),
    "averages": optax.chain(jadam.amsgrad(1e-3), jadam.average_params()),
    "groups": optax.partition(
        {"a": jadam.adam(1e-3, moments="int8"), "b": optax.set_to_zero()},
        {"embed": "a", "layers": "b", "scale": "a", "none": "a"},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_every_byte_is_counted(name):
    tx = TRANSFORMATIONS[name]
    state = jax.jit(tx.init)(PARAMS)
    of_state, of_tx = jadam.describe(state, PARAMS), jadam.describe(tx, PARAMS)
    assert (of_state.leaves, of_state.other_bytes) == (of_tx.leaves, of_tx.other_bytes)
    assert of_state.one_pass is None
    assert of_state.bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    assert of_state.other_bytes <= 64  # counts and versions
    assert [leaf.name for leaf in of_state.leaves] == [
        "['embed']",
        "['layers'][0]['bias']",
        "['layers'][0]['kernel']",
        "['layers'][1]",
        "['scale']",
    ]


def test_formats_and_reasons():
    rows = {leaf.name: leaf for leaf in jadam.describe(TRANSFORMATIONS["int8"], PARAMS).leaves}
    assert (rows["['embed']"].format, rows["['embed']"].reason) == ("int8", "")
    assert (rows["['scale']"].format, rows["['scale']"].reason) == ("float32", "0-dimensional, int8 needs 2 dimensions")
    by_name = jadam.adam(1e-3, moments=lambda path, leaf: "float32" if "embed" in path else "int8")
    rows = {leaf.name: leaf for leaf in jadam.describe(by_name, PARAMS).leaves}
    assert (rows["['embed']"].format, rows["['embed']"].reason) == ("float32", "set by the moments argument")
    rows = {leaf.name: leaf for leaf in jadam.describe(TRANSFORMATIONS["groups"], PARAMS).leaves}
    assert (rows["['layers'][0]['kernel']"].format, rows["['layers'][0]['kernel']"].bytes) == ("none", 0)
    rows = jadam.describe(jadam.adam(1e-3, mu_dtype=jnp.bfloat16), zeros(3)).leaves
    assert (rows[0].format, rows[0].reason, rows[0].bytes) == ("float32", "mu_dtype", 18)


def test_flax_and_a_bare_array():
    params = nnx.state(nnx.Linear(64, 128, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros), nnx.Param)
    described = jadam.describe(jadam.adam(1e-3, moments="int8"), params)
    assert [(x.name, x.format, x.bytes) for x in described.leaves] == [
        ("['bias']", "float32", 1024 + 2),
        ("['kernel']", "int8", 64 * 128 * 2 + 64 * 8),
    ]
    assert jadam.describe(jadam.adam(1e-3), zeros(5)).leaves[0].bytes == 40
    assert jadam.describe(jadam.adam(1e-3), zeros(())).leaves[0].bytes == 8
    assert math.isnan(jadam.describe(jadam.adam(1e-3), {}).bytes_per_parameter)


def test_the_table():
    lines = str(jadam.describe(TRANSFORMATIONS["int8"], PARAMS)).splitlines()
    assert lines[0].split() == ["parameter", "shape", "dtype", "moments", "bytes", "bytes/param", "reason"]
    assert "['embed']" in lines[1]
    assert "64x128" in lines[1]
    assert lines[-2].startswith("total")
    assert lines[-1].startswith("step: ")
    with pytest.raises(TypeError, match="params must be floating"):
        jadam.describe(jadam.adam(1e-3), np.arange(3))


def test_whether_a_step_is_one_pass(monkeypatch):
    """`describe` reports what `jadam.step` decides by transformation, leaves and active kernel."""
    plain = {"a": np.zeros((64, 128), np.float32), "b": np.zeros(3, np.float32)}
    on = jadam.backends()["cpu"].kernel
    said = lambda tx, params=plain: (jadam.describe(tx, params).one_pass, jadam.describe(tx, params).step)
    if on is not None:
        assert said(jadam.adam(1e-3, moments="int8")) == (True, f"fused on cpu ({on})")
        assert said(jadam.chain(jadam.clip(1.0), jadam.nadamw(1e-3)))[0]
        half = {**plain, "c": np.zeros(3, jnp.bfloat16)}
        one_but = f"fused on cpu ({on}), except ['c'] (no kernel for bfloat16 parameters without jadam.exact_bf16)"
        assert said(jadam.adam(1e-3), half) == (False, one_but)
        assert said(jadam.exact_bf16(jadam.adam(1e-3)), half)[0]
    two = "not fused: not a jadam optimizer (for a chain, use jadam.chain)"
    assert said(optax.chain(jadam.adam(1e-3))) == (False, two)
    assert "neither jadam.clip nor" in said(jadam.chain(optax.clip(1.0), jadam.adam(1e-3)))[1]
    assert "the optimizer inside jadam.exact_bf16 is not" in said(jadam.exact_bf16(optax.adam(1e-3)))[1]
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    assert said(jadam.adam(1e-3)) == (False, "not fused on cpu: JADAM_KERNELS=xla")


class Encoder(eqx.Module):
    """A model with fields named as those of Adam's state."""

    mu: eqx.nn.Linear
    weight: jax.Array


def test_parameters_named_as_the_state_s_fields():
    """The path `.mu.weight` is a parameter, and also, in Adam's state, the moment of `.weight`."""
    shapes = jax.eval_shape(lambda: Encoder(eqx.nn.Linear(64, 128, key=jax.random.key(0)), jnp.ones((256, 128))))
    p = jax.tree.map(lambda x: zeros(x.shape, x.dtype), shapes)
    tx = jadam.adam(1e-3)
    for leaf in jadam.describe(tx, p).leaves:
        assert (leaf.format, leaf.bytes) == ("float32", 8 * leaf.size)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert not jadam.sharding.zero1(tx, p, mesh, "data").undivided
    specs = [x.spec for x in jax.tree.leaves(jadam.sharding.zero1(tx, p, mesh, "data").shardings)]
    assert [len(spec) for spec in specs] == [0] + [1] * 6


def test_a_bare_array_has_neither_count_nor_version():
    for p in (zeros(5), zeros(())):
        described = jadam.describe(jadam.scale_by_adam(moments="int8"), p)
        # two placeholders of scales; the count, and version 2
        assert (described.leaves[0].bytes, described.other_bytes) == (8 * p.size + 2, 4 + 2)


class WithRing(NamedTuple):
    """Parameters with the field name of `jadam.record`'s ring."""

    ring: jax.Array
    other: jax.Array


@pytest.mark.parametrize("tx", [jadam.adam(1e-3), jadam.record(jadam.adam(1e-3), keep=2)])
def test_a_parameter_called_ring(tx):
    described = jadam.describe(tx, WithRing(zeros((64, 128)), zeros((8, 8))))
    assert [(leaf.name, leaf.bytes) for leaf in described.leaves] == [(".ring", 8 * 64 * 128), (".other", 8 * 64)]
