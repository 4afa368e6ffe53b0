"""The state in host memory between steps, moved in and out within the jitted step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MESH, assert_equal, host_offload_reason, normal, on_host, parametrize_grid
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jadam
from jadam.sharding import zero1

PLACES = {"one": SingleDeviceSharding(jax.devices()[0]), "eight": NamedSharding(MESH, PartitionSpec())}
OPTIMIZERS = {
    "float32": (jadam.adamw(1e-2), jnp.float32),
    "int8": (jadam.adamw(1e-2, moments="int8"), jnp.float32),
    "exact_bf16": (jadam.exact_bf16(jadam.adamw(1e-2, moments="int8")), jnp.bfloat16),
}


@pytest.mark.skipif(bool(host_offload_reason()), reason=host_offload_reason())
@parametrize_grid({"how": OPTIMIZERS, "place": PLACES}, default=["float32-one", "exact_bf16-eight"], slow=[])
def test_an_offloaded_state_has_the_same_bits(how, place, programs_compiled):
    """Four donated steps, compiled once; what comes back is in host memory again, the parameters are not."""
    tx, dtype = how
    start = lambda: jax.device_put({"w": normal(64, 128, dtype=dtype), "b": normal(128, dtype=dtype)}, place)
    tx = tx if place == PLACES["one"] else zero1(tx, start(), MESH, "data")

    def train_step(params, state, x, offloaded):
        grads = jax.tree.map(lambda p: jnp.cos(p + x).astype(p.dtype), params)
        if offloaded:
            grads, state = jax.lax.optimization_barrier((grads, state))
            state = jax.device_put(state, jax.memory.Space.Device)
        params, state = jadam.step(tx, grads, state, params)
        return params, jax.device_put(state, jax.memory.Space.Host) if offloaded else state

    def run(offloaded):
        params, state = start(), tx.init(start())
        state = jax.device_put(state, on_host(state)) if offloaded else state
        step = jax.jit(functools.partial(train_step, offloaded=offloaded), donate_argnums=(0, 1))
        before = programs_compiled()
        for i in range(4):
            params, state = step(params, state, np.float32(i))
        return params, state, programs_compiled() - before

    *expected, _ = run(offloaded=False)
    *found, compiled = run(offloaded=True)
    assert compiled == 1
    kinds = [{x.sharding.memory_kind for x in jax.tree.leaves(tree)} for tree in found]
    assert kinds == [{"device"}, {"pinned_host"}]
    assert_equal(jax.device_get(found), jax.device_get(expected))


@parametrize_grid(
    {
        "how": ["float32", "exact_bf16", "chain", "by_path"],
        "jitted": {"eager": False, "jit": True},
        "place": PLACES,
    },
    default=["float32-eager-one", "exact_bf16-jit-eight", "chain-jit-one", "by_path-eager-eight"],
    slow=[],
)
def test_a_state_that_is_not_moved_is_an_error(how, jitted, place):
    """The first array of the state in host memory is named."""
    more = {"chain": jadam.chain(jadam.clip(1.0), jadam.adam(1e-2)), "by_path": jadam.by_path([("", {})], 1e-2)}
    tx, dtype = OPTIMIZERS.get(how) or (more[how], jnp.float32)
    params = jax.device_put({"w": normal(64, 128, dtype=dtype)}, place)
    tx = tx if place == PLACES["one"] else zero1(tx, params, MESH, "data")
    state = tx.init(params)
    state = jax.device_put(state, on_host(state))
    text = r"^state[^ ]* must be in device memory, got memory kind 'pinned_host'\. Move it, under jit within the"
    for call in (functools.partial(jadam.step, tx), tx.update):
        with pytest.raises(ValueError, match=text):
            (jax.jit(call) if jitted else call)(params, state, params)


@pytest.mark.skipif(bool(host_offload_reason()), reason=host_offload_reason())
def test_an_eager_step_on_what_out_shardings_moved_is_an_error():
    """Its type says device memory (jax 0.10.2 and 0.12.0), its sharding does not."""
    params, tx = normal(64, 128), jadam.adam(1e-2)
    state = tx.init(params)
    state = jax.jit(lambda x: x, out_shardings=on_host(state))(state)
    with pytest.raises(ValueError, match=r"^state\[0\].count must be in device memory, got memory kind 'pinned_host'"):
        jadam.step(tx, params, state, params)


def test_frozen_parameters_may_be_in_host_memory():
    params = {"base": normal(64, 128), "adapter": normal(64, 8)}
    tx = jadam.by_path([("base", jadam.FROZEN), ("", {})], 1e-2)
    state = tx.init(params)
    expected, _ = jadam.step(tx, params, state, params)
    new, _ = jadam.step(tx, params, state, params | {"base": jax.device_put(params["base"], on_host(params["base"]))})
    assert new["base"].sharding.memory_kind == "pinned_host"
    assert_equal(jax.device_get(new), jax.device_get(expected))


def test_checksum_of_an_offloaded_state():
    state = jadam.adam(1e-2, moments="int8").init(normal(64, 128))
    assert jadam.checksum(jax.device_put(state, on_host(state))) == jadam.checksum(state)
