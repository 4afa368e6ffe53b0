"""The usual recipes that shard an optimizer's state like its parameters: by Flax's metadata, or by Optax's map.

Each gives the state's shardings, with which the state is made and takes a step. No mesh divides a placeholder of one
element, or an int8 leaf's scales by the parameter's specification: their last dimension counts blocks.
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.core import meta
from flax.training import train_state
from helpers import assert_equal, assert_steps_agree, parametrize, parametrize_grid, update_and_apply
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam._core.trees import find_states, params_tree, state_tree
from jadam._transformation.transformation import QuantizedAdamState
from jadam._wrappers.average_params import AverageParamsState
from jadam._wrappers.exact_bf16 import ExactBF16State

AUTO, EXPLICIT = (
    jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2) for kind in (AxisType.Auto, AxisType.Explicit)
)
# The first kernel can be int8, with one block in a row; the second is too small.
SIZES, KERNELS, BIASES = (64, 128, 8), (("data", "model"), (None, "model")), ("model",)


def choose(path, leaf):
    """An argument ``moments``."""
    return "bfloat16" if "bias" in path else "int8"


def decay(count):
    """A schedule of b1."""
    return 0.9 - 0.1 / (count + 1)


TRANSFORMATIONS = {
    "float32": jadam.adamw(1e-2),
    "bfloat16": jadam.adamw(1e-2, moments="bfloat16"),
    "int8": jadam.adamw(1e-2, moments="int8"),
    "function": jadam.adamw(1e-2, moments=choose),
    "scheduled": jadam.adamw(1e-2, b1=decay, moments="int8"),
    "exact_bf16": jadam.exact_bf16(jadam.adamw(1e-2)),
    "exact_bf16_int8": jadam.exact_bf16(jadam.adamw(1e-2, moments="int8")),
    "by_path": jadam.by_path([("bias", {"weight_decay": 0.0}), ("", {"moments": "bfloat16"})], 1e-2),
    "by_path_int8": jadam.by_path([("bias", {"b1": decay}), ("", {"moments": "int8"})], 1e-2),
    "frozen": jadam.by_path([("bias", jadam.FROZEN), ("", {})], 1e-2),
    "frozen_exact_bf16_int8": jadam.exact_bf16(jadam.by_path([("bias", jadam.FROZEN), ("", {})], 1e-2, moments="int8")),
    "average_params": optax.chain(jadam.adamw(1e-2), jadam.average_params(0.9)),
    "record": jadam.record(jadam.adamw(1e-2, moments="int8"), every=2, keep=3),
    "chain": jadam.chain(jadam.clip_by_global_norm(1e6), jadam.adamw(1e-2, moments="int8")),
}


def dtypes(tx):
    """The dtypes of the layers: under `jadam.exact_bf16` the last is float32, and its remainder a placeholder."""
    narrow = jnp.bfloat16 if "exact_bf16" in repr(tx) else jnp.float32
    return narrow, jnp.float32


def partitioned(library, names, init):
    """``init``, whose parameter has the metadata ``names``."""
    return library.with_partitioning(init, names)


class Net(linen.Module):
    """Two layers of Linen, with metadata."""

    dtypes: tuple

    @linen.compact
    def __call__(self, x):
        for n, names, dtype in zip(SIZES[1:], KERNELS, self.dtypes, strict=True):
            kernel = partitioned(linen, names, linen.initializers.lecun_normal())
            bias = partitioned(linen, BIASES, linen.initializers.normal())
            x = linen.Dense(n, kernel_init=kernel, bias_init=bias, param_dtype=dtype)(x)
        return x


class NNXNet(nnx.Module):
    """The same of NNX."""

    def __init__(self, dtypes):
        rngs = nnx.Rngs(0)
        for i, (names, dtype) in enumerate(zip(KERNELS, dtypes, strict=True)):
            kernel = partitioned(nnx, names, nnx.initializers.lecun_normal())
            bias = partitioned(nnx, BIASES, nnx.initializers.normal())
            layer = nnx.Linear(SIZES[i], SIZES[i + 1], kernel_init=kernel, bias_init=bias, param_dtype=dtype, rngs=rngs)
            setattr(self, f"layer{i}", layer)


@functools.cache
def linen_params(dtypes):
    """Boxed parameters, on one device."""
    return jax.jit(Net(dtypes).init)(jax.random.key(0), np.ones((1, SIZES[0]), np.float32))["params"]


# Each recipe returns the parameters, their shardings and those of the state.


def linen_sharding(tx, params):
    """`linen.get_sharding` of metadata."""
    get = lambda tree: linen.get_sharding(tree, AUTO)
    return params, get(params), get(jax.eval_shape(tx.init, params))


def linen_spec(tx, params):
    """`linen.get_partition_spec` of metadata."""
    get = lambda tree: on_mesh(linen.get_partition_spec(tree))
    return params, get(params), get(jax.eval_shape(tx.init, params))


def linen_train_state(tx, params):
    """`linen.get_sharding` of a whole `TrainState`."""
    create = lambda params: train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    shardings = linen.get_sharding(jax.eval_shape(create, params), AUTO)
    assert_sharded(jax.jit(create, out_shardings=shardings)(params).opt_state, jax.device_put(params, shardings.params))
    return params, shardings.params, shardings.opt_state


def map_params(tx, params, of=lambda tx: tx):
    """`optax.tree.map_params`, with specifications of the parameters only."""
    specs, params = linen.get_partition_spec(params), meta.unbox(params)
    is_exact, is_frozen = ("exact_bf16" in repr(tx), "FROZEN" in repr(tx))
    # That a remainder is a placeholder, only its shape tells.
    own = (lambda x, spec: P() if x is None or x.size == 1 else spec) if is_exact else lambda _, spec: spec
    is_leaf = (lambda x: x is None) if is_frozen else None
    state = jax.eval_shape(tx.init, params)
    mapped = optax.tree.map_params(of(tx), own, state, specs, transform_non_params=lambda _: P(), is_leaf=is_leaf)
    return params, on_mesh(specs), on_mesh(mapped)


def on_mesh(specs):
    """The shardings of specifications."""
    return jax.tree.map(lambda spec: NamedSharding(AUTO, spec), specs, is_leaf=lambda x: isinstance(x, P))


RECIPES = {
    "sharding": linen_sharding,
    "spec": linen_spec,
    "TrainState": linen_train_state,
    "map_params": map_params,
    "map_params_init": functools.partial(map_params, of=lambda tx: tx.init),
}


def assert_sharded(state, params):
    """An array with a parameter's shape is divided as that parameter, unless it has one element."""
    of_shape = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    shared = [x for x in jax.tree.leaves(state) if x.shape in of_shape and x.size > 1]
    assert shared
    for x in shared:
        assert x.sharding.is_equivalent_to(of_shape[x.shape], x.ndim), (x.shape, x.sharding)


def assert_agree(new, expected, old):
    """`assert_steps_agree`, of masters in place of remainders. With other int8 blocks, of the parameters only."""

    def arrays(params, state):
        if exact := find_states(state_tree(state), ExactBF16State):
            return tuple(map(jax.tree.leaves, (jadam.float32_params(params, state), exact[0].inner_state)))
        return jax.tree.leaves(params_tree(params)), jax.tree.leaves(state_tree(state))

    new, expected, old = (arrays(*x) for x in (new, expected, old))
    # blocks divide the shards, if those are known when the state is made
    same_blocks = list(map(jnp.shape, new[1])) == list(map(jnp.shape, expected[1]))
    assert_steps_agree(*((params, state if same_blocks else []) for params, state in (new, expected, old)), int8=True)


def assert_finite(tree):
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


@parametrize_grid(
    {"recipe": RECIPES, "tx": TRANSFORMATIONS},
    default=["spec-by_path", "TrainState-int8", "map_params-int8"],
    slow=[],
)
def test_linen_and_optax(recipe, tx):
    params, param_shardings, state_shardings = recipe(tx, linen_params(dtypes(tx)))
    sharded, state = jax.device_put(params, param_shardings), tx.init(params)
    sharded_state = jax.jit(tx.init, out_shardings=state_shardings)(sharded)
    assert jax.tree.structure(sharded_state) == jax.tree.structure(state)
    assert_sharded(sharded_state, sharded)
    g = jax.tree.map(lambda x: 2 * x, params)
    step = functools.partial(update_and_apply, tx)
    alone = jax.jit(step)(g, state, params)
    inputs = jax.device_put(g, param_shardings), sharded_state, sharded
    jitted = jax.jit(step, out_shardings=(param_shardings, state_shardings))(*inputs)
    assert_sharded(jitted[1], jitted[0])
    for new in (jitted, step(*inputs)):
        assert_finite(new)
        assert_agree(new, alone, (params, state))


def boxed_as_earlier(state, params):
    """``state`` with boxes around all arrays, as earlier versions made it."""
    like = lambda tree, reference: jax.tree.unflatten(jax.tree.structure(reference), jax.tree.leaves(tree))

    def boxed(x):
        if isinstance(x, QuantizedAdamState):
            return x._replace(mu_scale=like(x.mu_scale, x.mu), nu_scale=like(x.nu_scale, x.mu))
        if isinstance(x, AverageParamsState):
            return x._replace(dtypes=like(x.dtypes, x.average))
        if isinstance(x, ExactBF16State):
            return x._replace(remainder=like(x.remainder, params), inner_state=boxed_as_earlier(x.inner_state, params))
        return x

    kinds = QuantizedAdamState, AverageParamsState, ExactBF16State
    return jax.tree.map(boxed, state, is_leaf=lambda x: isinstance(x, kinds))


@parametrize(
    "tx",
    {name: TRANSFORMATIONS[name] for name in ("int8", "exact_bf16_int8", "by_path_int8", "average_params", "record")},
    default=["average_params"],
    slow=["exact_bf16_int8"],
)
def test_states_of_earlier_versions(tx):
    """A state with boxes around all of its arrays takes the same step and keeps its structure."""
    params = linen_params(dtypes(tx))
    state = tx.init(params)
    old = boxed_as_earlier(state, params)
    assert jax.tree.structure(old) != jax.tree.structure(state)
    step = functools.partial(update_and_apply, tx)
    (q, new), (q_old, new_old) = step(params, state, params), step(params, old, params)
    assert_equal(q_old, q)
    assert jax.tree.structure(new_old) == jax.tree.structure(old)
    assert_equal(jax.tree.leaves(new_old), jax.tree.leaves(new))
    for read in (
        lambda state: [(x.bytes, x.format) for x in jadam.describe(state, params).leaves],
        lambda state: jadam.averaged_params(state) if find_states(state, AverageParamsState) else None,
        lambda state: jadam.float32_params(params, state) if find_states(state, ExactBF16State) else None,
        lambda state: jax.tree.leaves(jadam.convert_moments(state, "bfloat16")),
    ):
        jax.tree.map(np.testing.assert_array_equal, read(old), read(state))


def without_eager_sharding():
    """A context in which NNX does not shard a variable when it is made."""
    return flax.config.temp_flip_flag("always_shard_variable", False)


def nnx_optimizer(tx):
    """A model and its optimizer."""
    model = NNXNet(dtypes(tx))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def by_constraint(tx, mesh):
    """Constrained to the shardings of the metadata where both are made."""

    @nnx.jit
    def make():
        with without_eager_sharding():
            both = nnx_optimizer(tx)
            state = nnx.state(both)
            nnx.update(both, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return both

    return make()


def by_named_sharding(tx, mesh):
    """Made on one device, then put on the mesh."""
    with without_eager_sharding():
        both = nnx_optimizer(tx)
        state = nnx.state(both)
        nnx.update(both, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    return both


def by_eager_sharding(tx, mesh):
    """Each variable is sharded by its metadata when it is made."""
    return nnx_optimizer(tx)


NNX_RECIPES = {
    "constraint": (by_constraint, AUTO),
    "named_sharding": (by_named_sharding, AUTO),
    "eager": (by_eager_sharding, AUTO),
    "explicit": (by_eager_sharding, EXPLICIT),
}


def nnx_step(model, optimizer):
    """A step with gradients that are twice the parameters."""
    optimizer.update(model, jax.tree.map(lambda x: 2 * x, nnx.state(model, nnx.Param)))


@parametrize_grid(
    {"recipe": NNX_RECIPES, "tx": TRANSFORMATIONS},
    default=["eager-by_path", "explicit-int8"],
    slow=[],
)
def test_nnx(recipe, tx):
    make, mesh = recipe
    try:
        with jax.set_mesh(mesh):
            NNXNet(dtypes(tx))
    except AssertionError as error:
        pytest.skip(f"Flax {flax.__version__} makes no sharded variable in an explicit mesh: {error}")
    with without_eager_sharding():
        alone = nnx_optimizer(tx)
        old = nnx.clone(alone)
    nnx.jit(nnx_step)(*alone)
    with jax.set_mesh(mesh):
        for step in (nnx.jit(nnx_step), nnx_step):
            sharded = make(tx, mesh)
            assert_sharded(nnx.state(sharded[1]), nnx.state(sharded[0]))
            step(*sharded)
            assert_finite([nnx.state(x) for x in sharded])
            assert_agree(sharded, alone, old)
