"""States saved and restored with Orbax, on one and eight devices, and between Optax and jadam."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import assert_equal, normal, parametrize_grid, zip_leaves

import jadam

STATES = {
    "float32": jadam.adam(optax.cosine_decay_schedule(1e-3, 10)),
    "bfloat16": jadam.nadamw(1e-3, moments="bfloat16"),
    "int8": jadam.adam(1e-3, moments="int8"),
    "amsgrad": jadam.amsgrad(1e-3, moments="bfloat16"),
    "scheduled betas": jadam.chain(jadam.clip(1.0), jadam.adam(1e-3, lambda count: 0.9, moments="int8")),
    "exact_bf16": jadam.exact_bf16(optax.MultiSteps(jadam.adamw(1e-3, moments="int8"), 2)),
    "by_path": jadam.by_path([("bias", jadam.FROZEN), ("", {"b1": lambda count: 0.9})], 1e-3, moments="int8"),
    "average": optax.chain(jadam.radam(1e-3), jadam.average_params()),
}


def params():
    return {
        "kernel": normal(64, 768),
        "wide": normal(50, 768, dtype=jnp.bfloat16),
        "bias": normal(24),
        "scale": normal(),
    }


def one_device(tree):
    """``tree`` committed to the first device."""
    return jax.device_put(tree, jax.devices()[0])


def eight_devices(tree):
    """``tree`` sharded along its last axes over eight devices."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(x):
        spec = (*[None] * (x.ndim - 1), "x") if x.ndim else ()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    return jax.tree.map(put, tree)


def committed(state, scalar):
    """``state`` committed as after a step, so that the next step needs no new program.

    Arrays on other devices than ``scalar`` get its sharding.
    """
    there = lambda x: x.sharding.device_set == scalar.sharding.device_set
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding if there(x) else scalar.sharding), state)


def abstract(tree):
    """Shapes, dtypes and shardings of ``tree``."""
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def save_and_restore(tree, path):
    """``tree`` after a round trip through Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, abstract(tree))


@parametrize_grid(
    {"tx": STATES, "place": {"one device": one_device, "eight devices": eight_devices}},
    default=["by_path-one device", "exact_bf16-one device", "int8-eight devices"],
)
def test_save_and_restore(tx, place, tmp_path):
    """A restored state has the same bits and shardings, and the next step compiles nothing."""
    p = place(params())
    update = jax.jit(tx.update)
    _, state = update(p, committed(tx.init(p), p["scale"]), p)
    again = save_and_restore(state, tmp_path / "state")
    assert_equal(again, state)
    for x, y in zip_leaves(again, state):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    expected, compiled = update(p, state, p), update._cache_size()
    jax.tree.map(np.testing.assert_array_equal, update(p, again, p), expected)
    assert update._cache_size() == compiled


OPTAX = {
    "adam": (optax.adam(1e-3), jadam.adam(1e-3)),
    "adamw with a mask": (
        optax.adamw(lambda count: 1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        jadam.adamw(lambda count: 1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ),
    "a chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-3)),
    ),
}


@functools.cache
def updates_of(tx):
    return jax.jit(tx.update)


@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.parametrize("back", [False, True], ids=["Optax's into jadam", "jadam's into Optax"])
def test_between_optax_and_jadam(name, back, tmp_path):
    saved, wanted = reversed(OPTAX[name]) if back else OPTAX[name]
    p = {key: params()[key] for key in ("kernel", "bias")}
    _, state = updates_of(saved)(p, one_device(saved.init(p)), p)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", abstract(wanted.init(p)))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    updates, _ = updates_of(wanted)(p, again, p)
    expected, _ = updates_of(saved)(p, state, p)
    for x, y in zip_leaves(updates, expected):
        np.testing.assert_allclose(x, y, rtol=2e-5)  # Optax's own error is 1.3e-5, see test_adam.py


@pytest.mark.slow
def test_optax_s_checkpoint_into_int8(tmp_path):
    p = params()
    tx = jadam.adamw(1e-3, moments="int8")
    state = save_and_restore(optax.adamw(1e-3).init(p), tmp_path / "state")
    state = jax.jit(lambda state: jadam.convert_moments(state, "int8"))(state)
    assert jax.tree.structure(jax.tree.map(jnp.shape, state)) == jax.tree.structure(
        jax.tree.map(jnp.shape, jax.eval_shape(tx.init, p))
    )
    jax.eval_shape(tx.update, p, state, p)


def test_a_later_version_is_refused(tmp_path):
    """A state of a later version is an error in `update`, and in Orbax if restored into a state of this one."""
    tx = jadam.scale_by_adam(moments="int8")
    p = params()["kernel"]
    state = tx.init(p)._replace(version=np.zeros(3, np.int8))
    path = tmp_path / "state"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        as_saved = checkpointer.restore(path, abstract(state))
        with pytest.raises(ValueError, match=r"state.version must be 2, got 3"):
            tx.update(p, as_saved, p)
        checkpointer.save(
            tmp_path / "version", {"version": state.version}
        )  # without the other arrays, which Orbax would leave half read
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="shape"):
            checkpointer.restore(tmp_path / "version", abstract({"version": tx.init(p).version}))
