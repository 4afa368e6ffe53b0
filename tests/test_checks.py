"""Tables of wrong calls, each with its exception type and its one-line text.

Texts give the name, the allowed values, the actual value, and often a remedy. Errors that list all problems of a file,
one a line, are in `test_torch_state`.
"""

import functools
import json
import re

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.serialization import to_state_dict
from golden import texts
from helpers import MESH, on_host, ones, zeros
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import jadam
import jadam.flax
from jadam import torch_state
from jadam._diagnostics import plan as planning
from jadam.sharding import shard_largest_dim, zero1


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), tree)


W = {"w": ones((2, 3)), "b": {"c": zeros(3)}}
HALF = cast(W, jnp.bfloat16)
INT = {"w": ones(2), "ids": jnp.asarray(np.arange(3))}
ADAM, EXACT, SGD = jadam.adam(1e-3), jadam.exact_bf16(jadam.adam(1e-3)), optax.sgd(1e-3)
STATE = ADAM.init(W)
RULES = [("", {})]
VECTOR = ones(16)
DIVIDED = zero1(ADAM, VECTOR, MESH, "data")
SHAPE = jax.ShapeDtypeStruct((2, 3), jnp.float32)
COMPLEX = cast(W, np.complex64)
MATRIX = zeros((64, 128))
INT8 = jadam.adam(1e-3, moments="int8")
CODES = INT8.init(MATRIX)
UNTYPED = "Argument order: state, then params. If the state was restored as a list or dict (JSON, msgpack, Orbax): "
REBUILD = "jax.tree.unflatten(jax.tree.structure(tx.init(params)), jax.tree.leaves(state))"
TEMPLATE = "restore it into the template tx.init(params)"


def updated(tx=None, params=W, **changed):
    """``tx.update`` with W as gradients, some leaves changed."""
    tx = tx or jadam.adam(1e-3)
    return tx.update(changed.get("g", params), changed.get("state", tx.init(params)), changed.get("p", params))


def stepped(tx=ADAM, params=W, **changed):
    """`jadam.step` with W as gradients, some leaves changed."""
    state = changed.get("state", tx.init(params))
    return jadam.step(tx, changed.get("g", params), state, changed.get("p", params))


def donated(tree=W):
    """Deleted arrays."""
    gone = jax.tree.map(lambda x: jnp.array(np.asarray(x)), tree)
    jax.tree.map(lambda x: x.delete(), gone)
    return gone


def on(device, tree=W):
    return jax.device_put(tree, jax.devices()[device])


def in_host_memory(tree):
    return jax.device_put(tree, on_host(tree))


HYPERPARAMETERS = [
    (lambda: jadam.adam(1e-3, b1=1.0), ValueError, "b1 must be in [0, 1), got 1. Did you swap it with learning_rate"),
    (lambda: jadam.adam(1e-3, b2=1.5), ValueError, "b2 must be in [0, 1), got 1.5. Did you swap it"),
    (lambda: jadam.adam(1e-3, b2=-0.1), ValueError, "b2 must be in [0, 1), got -0.1."),
    (lambda: jadam.adam(1e-3, b1=float("nan")), ValueError, "b1 must be in [0, 1), got nan."),
    (lambda: jadam.scale_by_adam(b1=jnp.float32(1.0)), ValueError, "b1 must be in [0, 1), got 1."),
    (lambda: jadam.scale_by_adam(b1=np.float32(2.0)), ValueError, "b1 must be in [0, 1), got 2."),
    (
        lambda: jadam.adam(1e-3, b1="0.9"),
        TypeError,
        "b1 must be a number or a schedule in [0, 1), got '0.9' of type str",
    ),
    (
        lambda: jadam.adam(1e-3, b2=True),
        TypeError,
        "b2 must be a number or a schedule in [0, 1), got True of type bool",
    ),
    (lambda: jadam.adam(1e-3, b2=None), TypeError, "b2 must be a number or a schedule in [0, 1), got None"),
    (lambda: jadam.adam(1e-3, b2=0.9j), TypeError, "b2 must be a number or a schedule in [0, 1), got 0.9j"),
    (lambda: jadam.adam(1e-3, b2=ones(3) * 0.9), ValueError, "b2 must be a scalar, got an array of shape (3,)"),
    (lambda: jadam.adam(1e-3, b2=np.ones(3) * 0.9), ValueError, "b2 must be a scalar, got an array of shape (3,)"),
    (
        lambda: jadam.adam(1e-3, b2=jnp.int32(0)),
        TypeError,
        "b2 must be a real floating-point number in [0, 1), got an array",
    ),
    (
        lambda: jadam.adam(1e-3, b2=jnp.bfloat16(0.9)),
        TypeError,
        "b2 must be float32 or wider, got bfloat16: 16 bits round 0.999 to 1 or 1e-8 to 0. Use a Python number or a float32 array. With optax.inject_hyperparams: hyperparam_dtype=jnp.float32.",
    ),
    (lambda: jadam.adam(1e-3, eps=jnp.float16(1e-3)), TypeError, "eps must be float32 or wider, got float16"),
    (lambda: jadam.adam(1e-3, eps=-1e-8), ValueError, "eps must be >= 0, got -1e-08."),
    (lambda: jadam.adam(1e-3, eps_root=-1), ValueError, "eps_root must be >= 0, got -1."),
    (lambda: jadam.adam(1e-3, eps=float("inf")), ValueError, "eps must be >= 0, got inf."),
    (lambda: jadam.adam(-1e-3), ValueError, "learning_rate must be >= 0, got -0.001. To maximise, negate the loss."),
    (
        lambda: jadam.adam("1e-3"),
        TypeError,
        "learning_rate must be a number or a schedule >= 0, got '1e-3' of type str",
    ),
    (lambda: jadam.adam(None), TypeError, "learning_rate must be a number or a schedule >= 0, got None"),
    (lambda: jadam.adamw(1e-3, weight_decay=-0.1), ValueError, "weight_decay must be >= 0, got -0.1."),
    (
        lambda: jadam.adamw(1e-3, weight_decay="a"),
        TypeError,
        "weight_decay must be a number or a schedule >= 0, got 'a'",
    ),
    (
        lambda: jadam.adam(1e-3, mu_dtype=jnp.int8),
        TypeError,
        "mu_dtype must be a floating dtype such as jnp.bfloat16, got",
    ),
    (
        lambda: jadam.adam(1e-3, mu_dtype="half-ish"),
        TypeError,
        "mu_dtype must be a floating dtype such as jnp.bfloat16",
    ),
    (lambda: jadam.adam(0.1, eps_mode="tf"), ValueError, "eps_mode must be 'paper' or 'hat', got 'tf'."),
    (lambda: jadam.adam(0.1, bias_correction=None), ValueError, "bias_correction must be True or False, got None."),
    (lambda: jadam.adam(0.1, nesterov="yes"), ValueError, "nesterov must be True or False, got 'yes'."),
    (
        lambda: jadam.adamw(0.1, weight_decay=None),
        TypeError,
        "weight_decay must be a number or a schedule >= 0, got None of type NoneType.",
    ),
    (lambda: jadam.adamw(0.1, max_lr=0.0), ValueError, "max_lr must be > 0, got 0."),
    (
        lambda: jadam.adamw(0.1, max_lr=optax.constant_schedule(1.0)),
        TypeError,
        "max_lr must be a number > 0, got <function",
    ),
    (lambda: jadam.adamw(0.1, mask="kernel"), TypeError, "mask must be True or False, got 'kernel'."),
    (
        lambda: jadam.adamw(0.1, mask={"w": True, "b": {"c": 1.0}}),
        TypeError,
        "mask['b']['c'] must be True or False, got 1.0.",
    ),
    (
        lambda: jadam.adamw(0.1, mask={"w": True}).init(W),
        ValueError,
        "mask must have the parameters' tree structure or a prefix of it, got PyTreeDef({'w': *}) for PyTreeDef(",
    ),
    (
        lambda: jadam.adamw(0.1, mask=lambda params: params).init(W),
        TypeError,
        "mask['b']['c'] must be True or False, got Array([0., 0., 0.], dtype=float32).",
    ),
    (lambda: jadam.radam(0.1, threshold=3), ValueError, "threshold must be >= 4, got 3."),
    (lambda: jadam.radam(0.1, nesterov=1), ValueError, "nesterov must be True or False, got 1."),
    (lambda: jadam.amsgrad(0.1, max_of="nu"), ValueError, "max_of must be 'v_hat' or 'v', got 'nu'."),
    (
        lambda: jadam.nadam(0.1, b1=optax.constant_schedule(0.9), momentum_decay=4e-3),
        ValueError,
        "momentum_decay must be None unless b1 is a number",
    ),
    (lambda: jadam.nadam(0.1, momentum_decay=-1), ValueError, "momentum_decay must be >= 0, got -1."),
    (
        lambda: jadam.adam(W),
        TypeError,
        "learning_rate must be a number or a schedule >= 0, got {'w': Array([[1., 1., 1.], [1., 1., 1.]], dtype=float32), ",
    ),
    (lambda: updated(jadam.adam(lambda count: -1.0)), ValueError, "learning_rate must be >= 0, got -1."),
    (
        lambda: updated(jadam.adam(lambda count: None)),
        TypeError,
        "learning_rate must be a number >= 0, got None of type NoneType.",
    ),
    (
        lambda: updated(jadam.adam(lambda count: ones(3))),
        ValueError,
        "learning_rate must be a scalar, got an array of shape (3,). Use jax.vmap",
    ),
    (
        lambda: stepped(jadam.adam(lambda count: ones(3))),
        ValueError,
        "learning_rate must be a scalar, got an array of shape (3,). Use jax.vmap",
    ),
    (
        lambda: updated(jadam.adamw(0.1, weight_decay=lambda count: "0.1")),
        TypeError,
        "weight_decay must be a number >= 0, got '0.1' of type str.",
    ),
    (
        lambda: stepped(jadam.adamw(0.1, weight_decay=lambda count: ones(3))),
        ValueError,
        "weight_decay must be a scalar, got an array of shape (3,).",
    ),
    (
        lambda: updated(jadam.by_path(RULES, lambda count: ones(3))),
        ValueError,
        "learning_rate must be a scalar, got an array of shape (3,).",
    ),
    (
        lambda: stepped(jadam.by_path([("", {"weight_decay": lambda count: -0.1})], 0.1)),
        ValueError,
        "weight_decay must be >= 0, got -0.1.",
    ),
    (lambda: updated(jadam.adam(0.1, b2=lambda count: 1.0)), ValueError, "b2 must be in [0, 1), got 1."),
    (
        lambda: updated(jadam.adam(0.1, eps=lambda count: ones(3))),
        ValueError,
        "eps must be a scalar, got an array of shape (3,).",
    ),
    (
        lambda: jax.jit(lambda on: jadam.adamw(0.1, mask=on).init(W))(True),
        TypeError,
        "mask must be True or False, got ",
    ),
    (lambda: jadam.clip(0), ValueError, "max_delta must be > 0, got 0."),
    (lambda: jadam.clip(donated()), TypeError, "max_delta must be a number > 0, got <dict> of type dict."),
    (lambda: jadam.clip_by_global_norm("1"), TypeError, "max_norm must be a number > 0, got '1' of type str."),
    (lambda: jadam.average_params(1.0), ValueError, "decay must be in [0, 1), got 1."),
    (lambda: jadam.average_params("0.9"), TypeError, "decay must be a number in [0, 1), got '0.9' of type str"),
    (
        lambda: jadam.average_params(optax.constant_schedule(0.9)),
        TypeError,
        "decay must be a number in [0, 1), got <function",
    ),
    (
        lambda: updated(optax.inject_hyperparams(jadam.adam)(1e-3), HALF),
        TypeError,
        "b1 must be float32 or wider, got bfloat16: 16 bits round 0.999 to 1 or 1e-8 to 0. Use a Python number or a float32 array. With optax.inject_hyperparams: hyperparam_dtype=jnp.float32.",
    ),
    (
        lambda: updated(jadam.adam(1e-3, b2=lambda count: jnp.bfloat16(0.99))),
        TypeError,
        "b2 must be float32 or wider, got bfloat16: 16 bits round 0.999 to 1 or 1e-8 to 0. Use a Python number or a float32 array.",
    ),
]

TREES = [
    (
        lambda: jadam.adam(1e-3).init(INT),
        TypeError,
        "params['ids'] must be floating or complex to be trained, got int32",
    ),
    (lambda: jadam.adam(1e-3).init({"m": ones(2, bool)}), TypeError, "params['m'] must be floating or complex"),
    (lambda: updated(g={"w": W["w"]}), ValueError, "updates['b']['c'] is missing or None, params has it."),
    (lambda: updated(g={"w": W["w"]}, p=None), ValueError, "updates['b']['c'] is missing or None, state.mu has it"),
    (lambda: updated(g={**W, "z": W["w"]}, p=None), ValueError, "state.mu['z'] is missing or None, updates has it."),
    (lambda: updated(g={**W, "b": {"c": None}}, p=None), ValueError, "updates['b']['c'] is missing or None"),
    (
        lambda: updated(g={**W, "b": {"c": zeros(4)}}, p=None),
        ValueError,
        "updates['b']['c'] has shape (4,), state.mu",
    ),
    (lambda: updated(g=(W["w"],), p=None), ValueError, "state.mu[0] is missing or None, updates has it."),
    (lambda: updated(jadam.scale_by_adam(), g=[W], p=None), ValueError, "state.mu[0]['b']['c'] is missing or None"),
    (lambda: updated(p={**W, "w": ones(2)}), ValueError, "params['w'] has shape (2,), updates has (2, 3)"),
    (lambda: updated(g=cast(W, int)), TypeError, "updates['b']['c'] must be floating"),
    (
        lambda: updated(jadam.adamw(1e-3), p=None),
        ValueError,
        "weight_decay needs params: call update(updates, state, params).",
    ),
    (
        lambda: updated(state=optax.adam(1e-3).init(cast(W, jnp.bfloat16))),
        TypeError,
        "state.mu['b']['c'] must be float32 or wider, got bfloat16",
    ),
    (
        lambda: updated(state=optax.adam(1e-3, mu_dtype=jnp.float32).init(cast(W, jnp.float16))),
        TypeError,
        "state.nu['b']['c'] must be float32 or wider, got float16",
    ),
    (
        lambda: updated(jadam.adam(1e-3, mu_dtype=jnp.bfloat16), g=ones(2, jnp.complex64), params=ones(2)),
        TypeError,
        "updates is a complex gradient, but params is real (float32). Take the gradient's real part: jnp.real(g).",
    ),
    (lambda: updated(g={**W, "w": "one"}), TypeError, "updates['w'] must be an array, got 'one' of type str."),
    (
        lambda: updated(p={**W, "w": len}),
        TypeError,
        "params['w'] must be an array, got <built-in function len> of type builtin",
    ),
    (
        lambda: updated(g={**W, "w": np.full((2, 3), None)}),
        TypeError,
        "updates['w'] must be an array, got array([[None",
    ),
    (lambda: ADAM.init("params"), TypeError, "params must be an array, got 'params' of type str."),
    (
        lambda: updated(g={**W, "w": SHAPE}),
        TypeError,
        "updates['w'] must be an array, got a ShapeDtypeStruct, which has no values.",
    ),
    (
        lambda: updated(g=donated()),
        ValueError,
        "updates['b']['c'] was donated to an earlier step; use the value that step returned.",
    ),
    (lambda: updated(p=donated()), ValueError, "params['b']['c'] was donated"),
    (lambda: updated(state=donated(STATE)), ValueError, "state[0].count was donated"),
    (
        lambda: updated(jadam.adam(1e-3, moments="int8"), state=donated(jadam.adam(1e-3, moments="int8").init(W))),
        ValueError,
        "state[0].count was donated",
    ),
    (
        lambda: updated(jadam.by_path(RULES, 1e-3), p=donated()),
        ValueError,
        "params['b']['c'] was donated",
    ),
    (lambda: updated(state=None), TypeError, "state must be the tuple of 2 that init returns, got NoneType."),
    (
        lambda: updated(state=W),
        TypeError,
        "state must be the tuple of 2 that init returns, got dict of 2. Argument order: state, then params. If the state was restored as a list or dict (JSON, msgpack, Orbax): jax.tree.unflatten(",
    ),
    (
        lambda: updated(state=SGD.init(W)),
        TypeError,
        "state must be the ScaleByAdamState that init returns, got EmptyState. It was made by another optimizer",
    ),
    (
        lambda: updated(state=(STATE[0]._replace(count=3), STATE[1])),
        TypeError,
        "state.count must be int32, got int. Convert it: jnp.int32(state.count).",
    ),
    (
        lambda: updated(state=(STATE[0]._replace(count=zeros(8, int)), STATE[1])),
        ValueError,
        "state.count must be a scalar, got shape (8,). Use jax.vmap for several states.",
    ),
    (
        lambda: updated(state=(STATE[0]._replace(mu=None), STATE[1])),
        ValueError,
        "state.mu is None.",
    ),
    (
        lambda: updated(jadam.adam(1e-3, b1=optax.constant_schedule(0.9)), state=STATE),
        TypeError,
        "state must be the ScheduledBetasState that init returns, got ScaleByAdamState.",
    ),
    (
        lambda: updated(jadam.chain(jadam.clip(1.0), ADAM), state=STATE[:1]),
        TypeError,
        "state must be the tuple of 2 that init returns, got tuple of 1.",
    ),
    (lambda: stepped(g=None), ValueError, "grads is None. Call step(tx, grads, state, params)."),
    (lambda: stepped(p=None), ValueError, "params is None. Call step(tx, grads, state, params)."),
    (lambda: stepped(g={**W, "w": ones(3)}), ValueError, "params['w'] has shape (2, 3), updates has (3,)."),
    (
        lambda: stepped(state=SGD.init(W)),
        TypeError,
        "state must be the ScaleByAdamState that init returns, got EmptyState.",
    ),
    (lambda: stepped(g={**W, "w": "one"}), TypeError, "grads['w'] must be an array, got 'one' of type str."),
    (lambda: stepped(state="state"), TypeError, "state must be an array, got 'state' of type str."),
    (lambda: stepped(p=donated()), ValueError, "params['b']['c'] was donated to an earlier step"),
    (
        lambda: stepped(p={**W, "w": SHAPE}),
        TypeError,
        "params['w'] must be an array, got a ShapeDtypeStruct, which has no values. To compute with shapes: jax.eval_shape.",
    ),
    (
        lambda: stepped(g=on(1), p=on(2)),
        ValueError,
        "grads, state, params must be on the same devices, got params['b']['c'] on [CpuDevice(id=2)] and grads['b']['c'] on [CpuDevice(id=1)]. Move one: jax.device_put(params, sharding).",
    ),
    (
        lambda: jadam.step(None, 1, 2, 3),
        TypeError,
        "step needs an Optax transformation, got None. For example: jadam.adam(1e-3).",
    ),
    (lambda: jadam.step(jadam.adam, W, STATE, W), TypeError, "step needs an Optax transformation, got <function adam"),
    (lambda: jadam.chain(ADAM, 3), TypeError, "chain's stage 1 must be an Optax transformation, got 3."),
    (lambda: jadam.chain(), ValueError, "chain needs at least one stage, got none."),
    (
        lambda: jadam.chain(EXACT),
        ValueError,
        "chain's stage 0 is exact_bf16, which must be outermost: exact_bf16(chain(...)).",
    ),
    (
        lambda: updated(jadam.average_params(), p=None),
        ValueError,
        "average_params needs params: call update(updates, state, params).",
    ),
    (
        lambda: jadam.averaged_params(STATE),
        ValueError,
        "state must contain one AverageParamsState, found 0. Train with optax.chain(tx, jadam.average_params()).",
    ),
    (
        lambda: jadam.averaged_params(optax.chain(jadam.average_params(), jadam.average_params()).init(W)),
        ValueError,
        "state must contain one AverageParamsState, found 2. Pass a part of state that has one.",
    ),
    (
        lambda: jadam.describe(ADAM, INT),
        TypeError,
        "params['ids'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: jadam.describe(ADAM, None),
        TypeError,
        "params must be a tree of parameters, got None. Argument order: tx, params.",
    ),
    (
        lambda: jadam.describe(W, ADAM),
        TypeError,
        "params must be a tree of parameters, got jadam.adam(learning_rate=0.001). Argument order",
    ),
    (lambda: jadam.describe(None, W), TypeError, "state_or_tx must be a transformation or its state, got None."),
    (lambda: jadam.describe("adam", W), TypeError, "state_or_tx must be an array, got 'adam' of type str."),
    (
        lambda: jadam.flax.TrainState.create(apply_fn=None, params=W, tx=3),
        TypeError,
        "TrainState needs an Optax transformation, got 3.",
    ),
    (
        lambda: jadam.flax.TrainState.create(apply_fn=None, params=len, tx=ADAM),
        TypeError,
        "params must be an array, got <built-in function len>",
    ),
    (
        lambda: jadam.flax.Optimizer(
            nnx.Linear(2, 3, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros), jadam.adam, wrt=nnx.Param
        ),
        TypeError,
        "Optimizer needs an Optax transformation, got <function adam",
    ),
    (lambda: updated(g=None), ValueError, "updates is None. Gradients, parameters and the tree given to init"),
    (lambda: updated(g=None, p=None), ValueError, "updates is None."),
    (lambda: updated(EXACT, HALF, g=None), ValueError, "updates is None."),
    (
        lambda: updated(g=COMPLEX),
        TypeError,
        "updates['b']['c'] is a complex gradient, but params['b']['c'] is real (float32). Take the gradient's real part: jnp.real(g).",
    ),
    (
        lambda: stepped(INT8, MATRIX, g=MATRIX + 1j),
        TypeError,
        "updates is a complex gradient, but params is real (float32). Take the gradient's real part: jnp.real(g).",
    ),
    (
        lambda: updated(g=COMPLEX, p=None),
        TypeError,
        "updates['b']['c'] is a complex gradient, but state.mu['b']['c'] is real (float32). Take the gradient's real part: jnp.real(g). If the parameter is complex, leave out mu_dtype.",
    ),
    (
        lambda: updated(jadam.adam(1e-3, mu_dtype=jnp.bfloat16), COMPLEX),
        TypeError,
        "state.mu['b']['c'] must be complex for a complex parameter, got bfloat16. Leave out mu_dtype, and call init on these parameters.",
    ),
    (lambda: updated(state=list(STATE)), TypeError, f"got list of 2. {UNTYPED}{REBUILD}."),
    (lambda: updated(state=to_state_dict(STATE)), TypeError, f"got dict of 2. {UNTYPED}{TEMPLATE}."),
    (lambda: stepped(INT8, MATRIX, state=to_state_dict(CODES)), TypeError, f"got dict of 2. {UNTYPED}{TEMPLATE}."),
    (
        lambda: updated(jadam.scale_by_adam(), state=to_state_dict(STATE[0])),
        TypeError,
        f"state must be the ScaleByAdamState that init returns, got dict. {UNTYPED}{TEMPLATE}.",
    ),
    (
        lambda: updated(EXACT, HALF, state=to_state_dict(EXACT.init(HALF))),
        TypeError,
        f"state must be the ExactBF16State that init returns, got dict. {UNTYPED}{TEMPLATE}.",
    ),
    (
        lambda: updated(EXACT, HALF, state=None),
        TypeError,
        "state must be the ExactBF16State that init returns, got NoneType. Make it with tx.init(params).",
    ),
    (
        lambda: ADAM.init({"f": len}),
        TypeError,
        "of type builtin_function_or_method. Pass arrays only: eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param).",
    ),
]

DTYPES = [
    (
        lambda: updated(g={**W, "w": np.zeros((2, 3), jax.dtypes.float0)}),
        TypeError,
        "updates['w'] must be floating or complex to be trained, got float0, the gradient of an integer.",
    ),
    (
        lambda: updated(g={**W, "w": jax.random.split(jax.random.key(0), 6).reshape(2, 3)}),
        TypeError,
        "updates['w'] must be floating or complex to be trained, got key<fry>.",
    ),
    (
        lambda: updated(p={**W, "w": ones((2, 3), int)}),
        TypeError,
        "params['w'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: ADAM.init(ones(3, jnp.float8_e4m3fn)),
        TypeError,
        "params must have at least 16 bits to be trained, got float8_e4m3fn. Keep it in bfloat16, and cast it in the model.",
    ),
    (
        lambda: updated(g={**W, "w": ones((2, 3), jnp.float8_e5m2)}),
        TypeError,
        "updates['w'] must have at least 16 bits to be trained, got float8_e5m2.",
    ),
    (
        lambda: updated(jadam.chain(jadam.clip(1.0), ADAM), g=cast(W, int)),
        TypeError,
        "updates['b']['c'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: updated(EXACT, HALF, g=cast(W, int)),
        TypeError,
        "updates['b']['c'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: updated(state=(STATE[0]._replace(nu=cast(W, int)), STATE[1])),
        TypeError,
        "state.nu['b']['c'] must be float32 or wider, got int32",
    ),
    (
        lambda: updated(state=(STATE[0]._replace(count=jnp.float32(3)), STATE[1])),
        TypeError,
        "state.count must be int32, got float32. Do not cast the whole state.",
    ),
    (
        lambda: jadam.exact_bf16(0.1),
        TypeError,
        "exact_bf16 needs an Optax transformation, got 0.1. For example: jadam.adam(1e-3).",
    ),
    (
        lambda: jadam.exact_bf16(optax.chain(EXACT)).init(W),
        ValueError,
        "exact_bf16 must be outermost, got it around another exact_bf16. Drop the inner one.",
    ),
    (lambda: updated(EXACT, HALF, p=None), ValueError, "exact_bf16 needs params: call update(updates, state, params)."),
    (
        lambda: updated(EXACT, HALF, state=STATE),
        TypeError,
        "state must be the ExactBF16State that init returns, got tuple.",
    ),
    (
        lambda: updated(EXACT, HALF, state=EXACT.init(W)),
        TypeError,
        "params['b']['c'] was of another dtype than bfloat16 at init, got bfloat16 of shape (3,). Pass the parameters of init, updated by",
    ),
    (
        lambda: updated(EXACT, HALF, p=W),
        TypeError,
        "params['b']['c'] was bfloat16 of shape (3,) at init, got float32 of shape (3,). Pass the parameters of init, updated by",
    ),
    (
        lambda: updated(EXACT, HALF, g={**HALF, "w": "one"}),
        TypeError,
        "updates['w'] must be an array, got 'one' of type str.",
    ),
    (
        lambda: jadam.from_float32(W, ADAM),
        TypeError,
        "tx must be from jadam.exact_bf16, got jadam.adam(learning_rate=0.001). Pass jadam.exact_bf16(tx), or",
    ),
    (
        lambda: jadam.from_float32(INT, EXACT),
        TypeError,
        "params32['ids'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: jadam.from_float32({"w": SHAPE}, EXACT),
        TypeError,
        "params32['w'] must be an array, got a ShapeDtypeStruct",
    ),
    (
        lambda: jadam.from_float32(W, EXACT, keep="norm"),
        TypeError,
        "keep must be a function f(path, leaf) that returns a bool, got 'norm'.",
    ),
    (
        lambda: jadam.float32_params(HALF, STATE),
        ValueError,
        "state must contain one ExactBF16State, found 0. Train with jadam.exact_bf16(...)",
    ),
    (
        lambda: jadam.float32_params({"w": HALF["w"]}, EXACT.init(HALF)),
        ValueError,
        "params['b']['c'] is missing or None, state.remainder has it.",
    ),
    (
        lambda: jadam.float32_params(W, EXACT.init(HALF)),
        TypeError,
        "params['b']['c'] was bfloat16 of shape (3,) at init, got float32",
    ),
    (
        lambda: jadam.float32_params(donated(HALF), EXACT.init(HALF)),
        ValueError,
        "params['b']['c'] was donated",
    ),
    (
        lambda: planning.shapes_of("gpt2", "half-ish"),
        TypeError,
        "dtype must be a floating dtype such as jnp.bfloat16, got 'half-ish'.",
    ),
    (
        lambda: planning.shapes_of("gpt2", None),
        TypeError,
        "dtype must be a floating dtype such as jnp.bfloat16, got None.",
    ),
    (lambda: planning.shapes_of("gpt5"), ValueError, "model must be 'gpt2' or 'llama-7b' or 'llama-70b', got 'gpt5'."),
]

FORMAT = "moments must be 'bfloat16' or 'float32' or 'int8' or a function f(path, leaf) that returns one of them, got "

FORMATS = [
    (lambda: jadam.adam(0.1, moments="int4"), ValueError, FORMAT + "'int4'. Did you mean 'int8'?"),
    (lambda: jadam.adam(0.1, moments=None), ValueError, FORMAT + "None."),
    (lambda: jadam.adam(0.1, moments=jnp.float16), ValueError, FORMAT + "'float16'. Did you mean 'bfloat16'?"),
    (
        lambda: jadam.adam(0.1, moments=W),
        ValueError,
        FORMAT + "{'w': Array([[1., 1., 1.], [1., 1., 1.]], dtype=float32), ",
    ),
    (
        lambda: jadam.adam(0.1, moments=lambda path, leaf: "int4").init(W),
        ValueError,
        "moments(\"['b']['c']\", leaf) must be 'bfloat16' or 'float32' or 'int8', got 'int4'. Did you mean 'int8'?",
    ),
    (
        lambda: jadam.adam(0.1, mu_dtype=jnp.bfloat16, moments="int8"),
        ValueError,
        "mu_dtype must be None with moments='int8', got bfloat16. Drop mu_dtype.",
    ),
    (
        lambda: jadam.adam(0.1, mu_dtype=jnp.bfloat16, moments="bfloat16"),
        ValueError,
        "mu_dtype must be None with moments='bfloat16', got bfloat16. Drop mu_dtype.",
    ),
    (
        lambda: jadam.adam(0.1, mu_dtype=jnp.bfloat16, moments=lambda path, leaf: "int8"),
        ValueError,
        "mu_dtype must be None when moments is a function, got bfloat16. Drop mu_dtype.",
    ),
    (
        lambda: jadam.adam(0.1, 0.9, 0.81, moments="int8"),
        ValueError,
        "moments='int8' needs b1*b1 < b2, got b1 = 0.9 and b2 = 0.81: m / sqrt(v) would be unbounded.",
    ),
    (
        lambda: jadam.adam(0.1, 0.9, 0.5, moments="int8"),
        ValueError,
        "moments='int8' needs b1*b1 < b2, got b1 = 0.9 and b2 = 0.5: m / sqrt(v) would be unbounded.",
    ),
    (
        lambda: jadam.adam(0.1, 0.9, 0.5, moments=lambda path, leaf: "int8").init(MATRIX),
        ValueError,
        "moments='int8' needs b1*b1 < b2, got b1 = 0.9 and b2 = 0.5",
    ),
    (
        lambda: jadam.amsgrad(0.1, moments="int8"),
        ValueError,
        "moments must be 'bfloat16' or 'float32' for this optimizer, got 'int8', which needs the bound",
    ),
    (
        lambda: updated(ADAM, MATRIX, state=CODES),
        TypeError,
        "state must be the ScaleByAdamState that init returns, got QuantizedAdamState. It was made by another optimizer, or with other arguments. If only its moments are stored differently: jadam.convert_moments(state, moments).",
    ),
    (
        lambda: updated(INT8, MATRIX, state=ADAM.init(MATRIX)),
        TypeError,
        "state must be the QuantizedAdamState that init returns, got ScaleByAdamState.",
    ),
    (
        lambda: updated(ADAM, MATRIX, state=jadam.adam(1e-3, moments="bfloat16").init(MATRIX)),
        TypeError,
        "state.mu must be float32 or wider, got bfloat16",
    ),
    (
        lambda: updated(jadam.adam(1e-3, moments="bfloat16"), MATRIX, state=ADAM.init(MATRIX)),
        TypeError,
        "state.mu must be bfloat16 with moments='bfloat16', got float32.",
    ),
    (
        lambda: updated(INT8, MATRIX, state=(CODES[0]._replace(mu=MATRIX, nu=MATRIX), CODES[1])),
        TypeError,
        "state.mu must be int8 because it has scales, got float32. Do not cast the whole state.",
    ),
    (
        lambda: updated(INT8, MATRIX, state=(CODES[0]._replace(version=zeros(3)), CODES[1])),
        ValueError,
        "state.version must be 2, got 3: a QuantizedAdamState saved by another version of jadam.",
    ),
    (
        lambda: updated(INT8, MATRIX, state=(CODES[0]._replace(version=3), CODES[1])),
        ValueError,
        "state.version must be 2, got 3: a QuantizedAdamState saved by another version of jadam.",
    ),
]

RECORD = jadam.record(ADAM)
ZERO1 = zero1(ADAM, VECTOR, MESH, "data")
WHOLE = "must be an integer in [1, 2**31), got "

TOLD = [  # statistics and records
    (
        lambda: jadam.statistics(optax.adam(1e-3), STATE, W),
        TypeError,
        "statistics needs a jadam optimizer, such as jadam.adam(...), got GradientTransformation",
    ),
    (
        lambda: jadam.statistics(optax.chain(ADAM), STATE, W),
        TypeError,
        "Use jadam.chain instead of optax.chain.",
    ),
    (
        lambda: jadam.statistics(ADAM, W, W),
        TypeError,
        "got dict of 2. Argument order: state, then params.",
    ),
    (
        lambda: jadam.statistics(None, None, W),
        TypeError,
        "statistics needs a jadam optimizer, such as jadam.adam(...), got None.",
    ),
    (
        lambda: jadam.statistics(jadam.chain(optax.clip(1.0), ADAM), (optax.EmptyState(), STATE), W),
        ValueError,
        "statistics and record do not support this transformation: jadam.chain's stage 0",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, None),
        ValueError,
        "statistics needs params, the parameters after the step.",
    ),
    (
        lambda: jadam.statistics(ADAM, W, STATE),
        TypeError,
        "params must be a tree of parameters, got an optimizer's state. Argument order: tx, state, params.",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, W, {**W, "w": ones(4)}),
        ValueError,
        "updates['w'] has shape (4,), params has (2, 3).",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, W, cast(W, int)),
        TypeError,
        "updates['b']['c'] must be floating or complex",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, {**W, "w": ones(4)}),
        ValueError,
        "params['w'] has shape (4,), state.mu has (2, 3).",
    ),
    (
        lambda: jadam.statistics(ADAM, jadam.amsgrad(1e-3).init(W), W),
        TypeError,
        "state must be the ScaleByAdamState that init returns, got ScaleByAmsgradState.",
    ),
    (lambda: jadam.statistics(ADAM, "state", W), TypeError, "state must be an array, got 'state' of type str."),
    (lambda: jadam.statistics(ADAM, donated(STATE), W), ValueError, "state[0].count was donated"),
    (
        lambda: jadam.statistics(jadam.by_path(RULES, 1e-3), jadam.by_path(RULES, 1e-3).init(W), [W]),
        ValueError,
        "state.moments.mu[0]['b']['c'] is missing or None, params has it. Gradients, parameters and the tree given to init must",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, W, sample=0),
        ValueError,
        "sample must be an integer in [1, 2**31) or None, got 0.",
    ),
    (
        lambda: jadam.statistics(ADAM, STATE, W, sample=1e3),
        ValueError,
        "sample must be an integer in [1, 2**31) or None, got 1000.0.",
    ),
    (
        lambda: jadam.record(optax.adam(1e-3)),
        TypeError,
        "record needs a jadam optimizer, such as jadam.adam(...), got GradientTransformation",
    ),
    (
        lambda: jadam.record(None),
        TypeError,
        "record needs a jadam optimizer, such as jadam.adam(...), got None. Optax's wrappers and jadam.sharding.zero1 must be outside",
    ),
    (
        lambda: jadam.record(ZERO1),
        TypeError,
        "got zero1: state of 1 of 1 parameters sharded 8 ways ('data'). Optax's wrappers and jadam.sharding.zero1 must be outside: optax.MultiSteps(jadam.record(...), 4).",
    ),
    (lambda: jadam.record(RECORD), ValueError, "record must not be applied to another record. Remove one."),
    (
        lambda: jadam.chain(jadam.clip(1.0), RECORD),
        ValueError,
        "chain's stage 1 is record, which must be outermost: record(chain(...)).",
    ),
    (
        lambda: jadam.exact_bf16(RECORD),
        ValueError,
        "exact_bf16 must be inside record, got it around record. Swap them: record(exact_bf16(tx)).",
    ),
    (
        lambda: jadam.record(jadam.chain(optax.clip(1.0), ADAM)).init(W),
        ValueError,
        "statistics and record do not support this transformation: jadam.chain's stage 0",
    ),
    (lambda: updated(RECORD, p=None), ValueError, "record needs params: call update(updates, state, params)."),
    (lambda: updated(RECORD, state=STATE), TypeError, "state must be the RecordState that init returns, got tuple."),
    (
        lambda: updated(ADAM, state=RECORD.init(W)),
        TypeError,
        "state must be the tuple of 2 that init returns, got RecordState, the state of a wrapper. Pass state.inner_state.",
    ),
    (lambda: jadam.record(ADAM, every=0), ValueError, f"every {WHOLE}0."),
    (lambda: jadam.record(ADAM, every=None), ValueError, f"every {WHOLE}None."),
    (lambda: jadam.record(ADAM, every=True), ValueError, f"every {WHOLE}True."),
    (lambda: jadam.record(ADAM, every=2**40), ValueError, f"every {WHOLE}1099511627776."),
    (lambda: jadam.record(ADAM, keep=-3), ValueError, f"keep {WHOLE}-3."),
    (lambda: jadam.record(ADAM, keep=10.0), ValueError, f"keep {WHOLE}10.0."),
    (lambda: jadam.record(ADAM, sample=0), ValueError, "sample must be an integer in [1, 2**31) or None, got 0."),
    (
        lambda: jadam.history(STATE),
        ValueError,
        "No recorded statistics in this state: ",
    ),
    (lambda: jadam.plot(RECORD.init(W)), TypeError, "plot needs the result of jadam.history(state), got RecordState."),
    (
        lambda: jadam.plot(jadam.history(RECORD.init(W))),
        ValueError,
        "plot needs a history with at least one record, got none.",
    ),
]

GROUPS = [
    (lambda: jadam.by_path("", 1e-3), TypeError, "rules must be a list of (pattern, settings), such as"),
    (lambda: jadam.by_path([], 1e-3), TypeError, "rules must be a list of (pattern, settings), such as"),
    (lambda: jadam.by_path({"bias": {}}, 1e-3), TypeError, "rules must be a list of (pattern, settings), such as"),
    (lambda: jadam.by_path(["bias"], 1e-3), TypeError, "rules[0] must be a pair (pattern, settings), got 'bias'."),
    (lambda: jadam.by_path([(3, {})], 1e-3), TypeError, "by_path's pattern must be a string, got 3."),
    (
        lambda: jadam.by_path([("['a", {})], 1e-3),
        ValueError,
        "by_path's pattern \"['a\" must be a regular expression: unterminated character set",
    ),
    (
        lambda: jadam.by_path([("", 1.0)], 1e-3),
        TypeError,
        "by_path's settings of '' must be a dict or jadam.FROZEN, got 1.0.",
    ),
    (
        lambda: jadam.by_path([("", {"weight_dcay": 1})], 1e-3),
        ValueError,
        "got 'weight_dcay'. Did you mean weight_decay?",
    ),
    (lambda: jadam.by_path([("", {"lr_mult": -1.0})], 1e-3), ValueError, "lr_mult must be >= 0, got -1."),
    (lambda: jadam.by_path([("", {"b2": 1.0})], 1e-3), ValueError, "b2 must be in [0, 1), got 1."),
    (
        lambda: jadam.by_path([("", {"moments": "int4"})], 1e-3),
        ValueError,
        "moments must be 'bfloat16' or 'float32' or 'int8'",
    ),
    (
        lambda: jadam.by_path([("", {"moments": "int8", "b1": 0.99, "b2": 0.9})], 1e-3),
        ValueError,
        "moments='int8' needs b1*b1 < b2",
    ),
    (lambda: jadam.by_path(RULES, -1.0), ValueError, "learning_rate must be >= 0, got -1."),
    (lambda: jadam.by_path(RULES, 1e-3, max_lr=0.0), ValueError, "max_lr must be > 0, got 0."),
    (lambda: jadam.by_path(RULES, 1e-3, nesterov=2), ValueError, "nesterov must be True or False, got 2."),
    (
        lambda: jadam.by_path([("kernal", {}), *RULES], 1e-3).init({"kernel": VECTOR}),
        ValueError,
        "by_path's pattern 'kernal' matches no path. Closest paths: ['kernel'].",
    ),
    (
        lambda: jadam.by_path([("w", {})], 1e-3).init(W),
        ValueError,
        "by_path has no pattern that matches ['b']['c']. Closest pattern: 'w'. To give all other",
    ),
    (
        lambda: jadam.by_path([("b", {}), ("c", jadam.FROZEN), *RULES], 1e-3).init(W),
        ValueError,
        "by_path's pattern 'c' is never used: earlier patterns, such as 'b', match all its paths. Move it before them.",
    ),
    (
        lambda: updated(jadam.by_path(RULES, 1e-3), p=None),
        ValueError,
        "by_path needs params: call update(updates, state, params).",
    ),
    (
        lambda: updated(jadam.by_path(RULES, 1e-3), state=STATE),
        TypeError,
        "state must be the ByPathState that init returns, got tuple.",
    ),
]

ABSTRACT = zero1(ADAM, VECTOR, AbstractMesh((8,), ("data",)), "data")
MATCH = "must match the params given to zero1 (number of arrays: 1), got "

SHARDINGS = [
    (
        lambda: zero1(3, VECTOR, MESH, "data"),
        TypeError,
        "zero1 needs an Optax transformation, got 3. For example: jadam.adam(1e-3).",
    ),
    (
        lambda: zero1(ADAM, VECTOR, {"data": 8}, "data"),
        TypeError,
        "mesh must be a jax.sharding.Mesh, got {'data': 8}. Make one: jax.make_mesh((8,), ('data',)).",
    ),
    (lambda: zero1(ADAM, VECTOR, None, "data"), TypeError, "mesh must be a jax.sharding.Mesh, got None."),
    (
        lambda: zero1(ADAM, VECTOR, jax.devices()[:1], "data"),
        TypeError,
        "mesh must be a jax.sharding.Mesh, got [CpuDevice(id=0)].",
    ),
    (
        lambda: zero1(ADAM, VECTOR, MESH, "model"),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got 'model'.",
    ),
    (
        lambda: zero1(ADAM, VECTOR, MESH, None),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got None.",
    ),
    (
        lambda: zero1(ADAM, VECTOR, MESH, {"data": 8}),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got {'data': 8}.",
    ),
    (
        lambda: zero1(ADAM, VECTOR, MESH, ()),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got ().",
    ),
    (
        lambda: zero1(ADAM, VECTOR, MESH, ("data", "data")),
        ValueError,
        "axis must name each mesh axis once, got ('data', 'data').",
    ),
    (
        lambda: zero1(ADAM, VECTOR, AbstractMesh((1, 8), ("one", "x")), "one"),
        ValueError,
        "axis must have size > 1, got 'one' in the mesh {'one': 1, 'x': 8}.",
    ),
    (
        lambda: zero1(ADAM, {"a": ones((3, 5))}, MESH, "data"),
        ValueError,
        "zero1 cannot shard the state of any parameter 8 ways ('data'): ['a']: no dimension of (3, 5) is a multiple of 8.",
    ),
    (
        lambda: zero1(SGD, VECTOR, MESH, "data"),
        ValueError,
        "zero1 cannot shard the state of any parameter 8 ways ('data'): there is none.",
    ),
    (
        lambda: zero1(ADAM, {"a": ones(8, int)}, MESH, "data"),
        TypeError,
        "params['a'] must be floating or complex to be trained, got int32.",
    ),
    (
        lambda: zero1(ADAM, {"a": "kernel"}, MESH, "data"),
        TypeError,
        "params['a'] must be an array, got 'kernel' of type str.",
    ),
    (
        lambda: zero1(
            ADAM,
            jax.device_put(VECTOR, NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))),
            MESH,
            "data",
        ),
        ValueError,
        "mesh must have the axes {'x': 8} that shard params, got {'data': 8}. Pass the parameters' mesh.",
    ),
    (
        lambda: ABSTRACT.init(VECTOR),
        ValueError,
        "mesh must be a jax.sharding.Mesh for init, update and jadam.step, got an AbstractMesh, which has no devices",
    ),
    (
        lambda: stepped(ABSTRACT, VECTOR, state=DIVIDED.init(VECTOR)),
        ValueError,
        "mesh must be a jax.sharding.Mesh for init, update and jadam.step, got an AbstractMesh",
    ),
    (
        lambda: updated(ABSTRACT, VECTOR, state=DIVIDED.init(VECTOR)),
        ValueError,
        "mesh must be a jax.sharding.Mesh for init, update and jadam.step, got an AbstractMesh",
    ),
    (
        lambda: DIVIDED.init(ones(8)),
        ValueError,
        f"params {MATCH}1. First mismatch: shape (8,), expected (16,). Call zero1 again for other parameters.",
    ),
    (
        lambda: stepped(DIVIDED, VECTOR, g=(VECTOR, VECTOR)),
        ValueError,
        f"grads {MATCH}2. First mismatch: shape (16,), expected None.",
    ),
    (
        lambda: updated(DIVIDED, VECTOR, g=None),
        ValueError,
        f"updates {MATCH}0. First mismatch: shape None, expected (16,).",
    ),
    (lambda: stepped(DIVIDED, VECTOR, p=None), ValueError, f"params {MATCH}0."),
    (
        lambda: stepped(DIVIDED, VECTOR, g=SHAPE),
        TypeError,
        "grads must be an array, got a ShapeDtypeStruct, which has no values.",
    ),
    (
        lambda: stepped(DIVIDED, VECTOR, state=VECTOR),
        TypeError,
        "state must have the 3 arrays that init returns, got ArrayImpl of 1. It belongs to another optimizer",
    ),
    (
        lambda: stepped(DIVIDED, VECTOR, state=ADAM.init(ones(3))),
        ValueError,
        "state[0].mu must have shape (16,), got (3,). It belongs to another optimizer or to other parameters.",
    ),
    (
        lambda: stepped(DIVIDED, VECTOR, p=donated(VECTOR)),
        ValueError,
        "params was donated to an earlier step",
    ),
    (
        lambda: shard_largest_dim(VECTOR, {"data": 8}, "data"),
        TypeError,
        "mesh must be a jax.sharding.Mesh, got {'data': 8}.",
    ),
    (
        lambda: shard_largest_dim(VECTOR, MESH, "model"),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got 'model'.",
    ),
    (
        lambda: shard_largest_dim({"a": "kernel"}, MESH, "data"),
        TypeError,
        "shapes['a'] must be an array, got 'kernel' of type str.",
    ),
    (lambda: jadam.plan(None, VECTOR, {"data": 8}, "data"), TypeError, "plan needs an Optax transformation, got None."),
    (
        lambda: jadam.plan(ADAM, VECTOR, 8, "data"),
        ValueError,
        "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got 8.",
    ),
    (
        lambda: jadam.plan(ADAM, VECTOR, {"data": 0}, "data"),
        ValueError,
        "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got {'data': 0}.",
    ),
    (
        lambda: jadam.plan(ADAM, VECTOR, {"data": 2.5}, "data"),
        ValueError,
        "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got {'data': 2.5}.",
    ),
    (
        lambda: jadam.plan(ADAM, VECTOR, {"data": "8"}, "data"),
        ValueError,
        "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got {'data': '8'}.",
    ),
    (
        lambda: jadam.plan(ADAM, VECTOR, {"a": 2**20, "b": 2**20}, "a"),
        ValueError,
        "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got {'a': 1048576, 'b': 1048576}.",
    ),
    (
        lambda: jadam.plan(ADAM, VECTOR, {"data": 8}, "model"),
        ValueError,
        "axis must be one or several of the mesh axes ('data',), got 'model'.",
    ),
    (
        lambda: jadam.plan(ADAM, "gpt2", {"data": 8}, "data"),
        TypeError,
        "shapes must be an array, got 'gpt2' of type str.",
    ),
]

SMALL = ADAM.init(zeros(2))

STATES = [  # conversions and checkpoints
    (
        lambda: jadam.convert_moments(SGD.init(W), "int8"),
        ValueError,
        "state must have the moments of an Adam (count, mu, nu), got tuple.",
    ),
    (
        lambda: jadam.convert_moments(None, "int8"),
        ValueError,
        "state must have the moments of an Adam (count, mu, nu), got NoneType.",
    ),
    (lambda: jadam.convert_moments(STATE, "int4"), ValueError, "moments must be 'bfloat16' or 'float32' or 'int8'"),
    (lambda: jadam.convert_moments("int8", STATE), TypeError, "state must be an array, got 'int8' of type str."),
    (
        lambda: jadam.convert_moments(jadam.amsgrad(1e-3).init(W), "int8"),
        ValueError,
        "moments must be 'bfloat16' or 'float32' for this optimizer, got 'int8'",
    ),
    (
        lambda: jadam.convert_moments(donated(STATE), "int8"),
        ValueError,
        "state[0].count was donated",
    ),
    (
        lambda: jadam.convert_moments(jax.eval_shape(ADAM.init, W), "int8"),
        TypeError,
        "state[0].count must be an array, got a ShapeDtypeStruct, which has no values.",
    ),
    (
        lambda: torch_state.from_torch({}, SMALL, ["w"]),
        TypeError,
        "names must be a dict from leaf paths to names in PyTorch, got ['w'] of type list.",
    ),
    (
        lambda: torch_state.from_torch(1, SMALL, {"": "w"}),
        TypeError,
        "source must be a dict of arrays or the path of a .safetensors file, got 1 of type int.",
    ),
    (
        lambda: torch_state.from_torch(W["w"], SMALL, {"": "w"}),
        TypeError,
        "source must be a dict of arrays or the path of a .safetensors file, got Array([[1., 1., 1.], [1., 1., 1.]]",
    ),
    (
        lambda: torch_state.from_torch("adam.pt", SMALL, {"": "w"}),
        ValueError,
        "source must end in .safetensors, got 'adam.pt'. Pickles are not supported",
    ),
    (lambda: torch_state.from_torch("no/such.safetensors", SMALL, {"": "w"}), FileNotFoundError, "no/such.safetensors"),
    (lambda: torch_state.to_torch(SMALL, {"": "w"}, 1), TypeError, "path must be a path, got 1 of type int."),
    (
        lambda: torch_state.to_torch(SMALL, {"": "w"}, "adam.pth"),
        ValueError,
        "path must end in .safetensors, got 'adam.pth'. Pickles are not supported",
    ),
    (
        lambda: stepped(state=in_host_memory(STATE)),
        ValueError,
        "state[0].count must be in device memory, got memory kind 'pinned_host'. Move it, under jit within the jitted function: jax.device_put(state, jax.memory.Space.Device).",
    ),
    (
        lambda: jax.jit(lambda state: stepped(EXACT, HALF, state=state))(in_host_memory(EXACT.init(HALF))),
        ValueError,
        "state.remainder['b']['c'] must be in device memory, got memory kind 'pinned_host'.",
    ),
    (
        lambda: jax.jit(lambda state: updated(state=state))(in_host_memory(STATE)),
        ValueError,
        "state[0].count must be in device memory, got memory kind 'pinned_host'.",
    ),
    (
        lambda: jadam.convert_moments(in_host_memory(STATE), "int8"),
        ValueError,
        "state[0].count must be in device memory, got memory kind 'pinned_host'.",
    ),
    (
        lambda: jadam.step(DIVIDED, VECTOR, in_host_memory(DIVIDED.init(VECTOR)), VECTOR),
        ValueError,
        "state[0].count must be in device memory, got memory kind 'pinned_host'.",
    ),
]

TABLES = {
    "hyperparameters": HYPERPARAMETERS,
    "trees": TREES,
    "dtypes": DTYPES,
    "formats": FORMATS,
    "statistics and records": TOLD,
    "groups": GROUPS,
    "shardings": SHARDINGS,
    "states": STATES,
}


CALLS = {f"{group}-{i}": row for group, rows in TABLES.items() for i, row in enumerate(rows)}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input(name):
    call, error, text = CALLS[name]
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert texts.plain(str(caught.value)) == texts.remembered(name)


AXES = "error: argument --mesh: must be axes and sizes > 0, got "
NUMBER = "must be a number > 0, got "
MANY = "9" * 5000  # more digits than int() accepts

COMMAND_LINE = [
    ([], "jadam: error: the following arguments are required: COMMAND"),
    (["train"], "jadam: error: argument COMMAND: invalid choice: 'train' (choose from "),
    (["plan", "gpt2"], "jadam: error: unrecognized arguments: gpt2"),
    (["plan", "--mesh", "data"], f"{AXES}'data'; try data=4,model=64"),
    (["plan", "--mesh", ""], f"{AXES}''; try data=4,model=64"),
    (["plan", "--mesh", "data=0"], f"{AXES}'data=0'; try data=4,model=64"),
    (["plan", "--mesh", "data=4.5"], f"{AXES}'data=4.5'; try data=4,model=64"),
    (["plan", "--mesh", "data=8,"], f"{AXES}'data=8,'; try data=4,model=64"),
    (["plan", "--mesh", "da\nta=8"], f"{AXES}'da\\nta=8'; try data=4,model=64"),
    (["plan", "--mesh", f"data={MANY}"], f"{AXES}'data={MANY}'; try data=4,model=64"),
    (["plan", "--mesh", "data=2,data=4"], "error: argument --mesh: must name each axis once, got 'data=2,data=4'"),
    (["plan", "--mesh"], "error: argument --mesh: expected one argument"),
    (
        ["plan", "--mesh", "data=1,model=2"],
        "error: --mesh: axis must have size > 1, got 'data' in the mesh {'data': 1, 'model': 2}.",
    ),
    (
        ["plan", "--mesh", "data=1000003"],
        "error: --mesh: zero1 cannot shard the state of any parameter 1000003 ways ('data'): ",
    ),
    (
        ["plan", "--mesh", f"data={10**12}"],
        "error: --mesh: mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got {'data': 1000000000000}.",
    ),
    (["plan", "--model", "gpt5"], "error: argument --model: invalid choice: 'gpt5' (choose from "),
    (["plan", "--axis", "model"], "error: --axis must be an axis of --mesh (data), got 'model'"),
    (["plan", "--axis", ""], "error: --axis must be an axis of --mesh (data), got ''"),
    (["plan", "--params-axis", "model"], "error: --params-axis must be an axis of --mesh (data), got 'model'"),
    (["plan", "--out", "plan.txt"], "error: --out must end in one of ."),
    (["plan", "--out", ""], "error: --out must end in one of ."),
    (["plan", "--out", "a\0b.png"], "error: --out must be a file name, got 'a\\x00b.png': "),
    (["plan", "--out", "/dev/null/x.png"], "error: --out: cannot write x.png into /dev/null: Not a directory"),
    (["demo", "--lr", "-1"], f"error: argument --lr: {NUMBER}'-1'; try 1e-3"),
    (["demo", "--lr", "nan"], f"error: argument --lr: {NUMBER}'nan'; try 1e-3"),
    (["demo", "--lr", "1e400"], f"error: argument --lr: {NUMBER}'1e400'; try 1e-3"),
    (["demo", "--lr", "fast"], f"error: argument --lr: {NUMBER}'fast'; try 1e-3"),
    (["demo", "--lr", "0"], f"error: argument --lr: {NUMBER}'0'; try 1e-3"),
    (["demo", "--steps", "0"], "error: argument --steps: must be an integer in [1, 1000000], got '0'"),
    (["demo", "--steps", "1e3"], "error: argument --steps: must be an integer in [1, 1000000], got '1e3'"),
    (["demo", "--steps", MANY], f"error: argument --steps: must be an integer in [1, 1000000], got '{MANY}'"),
    (["demo", "--seed", "-3"], "error: argument --seed: must be an integer in [0, 2147483647], got '-3'"),
    (
        ["demo", "--seed", "2147483648"],
        "error: argument --seed: must be an integer in [0, 2147483647], got '2147483648'",
    ),
    (
        ["demo", "--out", "no/such/folder/x.png"],
        "error: --out: cannot write x.png into no/such/folder: No such file or directory",
    ),
    (["demo", "--out", "x.digits"], "error: --out must end in one of ."),
    (["demo", "--out", "folder.png"], "error: --out must be a file, folder.png is a folder"),
    (["demo", "--out", f"{'x' * 250}.png"], f"error: --out: cannot write {'x' * 250}.png into .: File name too long"),
    (["demo", "--speed", "3"], "error: unrecognized arguments: --speed 3"),
    (["plan", "--params-axis", "data,x"], "error: --params-axis must be an axis of --mesh (data), got 'x'"),
    (["plan", "--memory", "0"], f"error: argument --memory: {NUMBER}'0'; try 80"),
    (
        ["plan", "--model", "llama-7b", "--shapes", "a.json"],
        "error: argument --shapes: not allowed with argument --model",
    ),
]


def command_line(arguments, folder):
    """`helpers.run_cli` in a folder that contains another folder."""
    (folder / "folder.png").mkdir(exist_ok=True)
    return helpers.run_cli(arguments, folder)


@pytest.mark.parametrize("row", range(len(COMMAND_LINE)))
def test_command_line(row, tmp_path):
    """Exit code 2, one line on standard error, and nothing written."""
    arguments, text = COMMAND_LINE[row]
    code, out, err = command_line(arguments, tmp_path)
    assert texts.plain(err) == texts.remembered(f"command line-{row}")
    assert (code, out) == (2, "")
    assert err.startswith("jadam")
    assert text in err
    assert len(err.splitlines()) == 1
    assert [x.name for x in tmp_path.iterdir()] == ["folder.png"]


def test_what_looks_wrong_and_is_not():
    """NumPy integers, numbers as arrays, and Equinox modules as masks are accepted."""
    assert (
        jadam.history(jadam.record(ADAM, every=np.int64(2), keep=np.int32(3), sample=np.uint8(9)).init(W)).steps.size
        == 0
    )
    assert jadam.record(ADAM, sample=None).init(W).ring.steps.shape == (1000,)
    updates, _ = ADAM.update(2.0, ADAM.init(1.0), 1.0)
    np.testing.assert_array_equal(updates, ADAM.update(jnp.float32(2), ADAM.init(jnp.float32(1)))[0])
    params, _ = jadam.step(ADAM, {"a": 2.0}, ADAM.init({"a": 1.0}), {"a": 1.0})
    assert params["a"] == 1 + updates


def test_a_mask_that_is_a_module():
    """A mask may be a pytree of booleans that is callable, as Equinox models are."""
    shapes = jax.eval_shape(lambda: eqx.filter(eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array))
    model = jax.tree.map(lambda x: np.linspace(-1, 1, x.size, dtype=x.dtype).reshape(x.shape), shapes)
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    assert callable(matrices(model))
    txs = [jadam.adamw(0.1, weight_decay=0.5, mask=mask) for mask in (matrices, matrices(model), False)]

    def both(tx):
        state = tx.init(model)
        return jadam.step(tx, model, state, model)[0], tx.update(model, state, model)[0]

    function, module, none = jax.jit(lambda: [both(tx) for tx in txs])()
    jax.tree.map(np.testing.assert_array_equal, module, function)
    for decayed, plain in zip(module, none, strict=True):
        differ = jax.tree.map(lambda x, y: (x != y).any(), decayed, plain)
        assert jax.tree.leaves(differ) == jax.tree.leaves(matrices(model))


@pytest.mark.parametrize("wrong", ["grads", "state", "both"])
def test_zero1_s_eager_step_takes_what_is_elsewhere(wrong):
    """Arrays committed to one device, as from a checkpoint, are moved; the bits are the same."""
    state = DIVIDED.init(VECTOR)
    expected = jadam.step(DIVIDED, 2 * VECTOR, state, VECTOR)
    grads = on(3, 2 * VECTOR) if wrong != "state" else 2 * VECTOR
    state = on(3, state) if wrong != "grads" else state
    found = jadam.step(DIVIDED, grads, state, VECTOR)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.sharding, found[1]) == jax.tree.map(lambda x: x.sharding, expected[1])
    if wrong != "grads":
        jax.tree.map(np.testing.assert_array_equal, DIVIDED.update(grads, state, VECTOR)[1], expected[1])


def test_the_same_under_jit():
    with pytest.raises(ValueError, match=r"updates\['w'\] has shape"):
        jax.jit(lambda g: updated(g=g, p=None))({**W, "w": ones(7)})


@functools.cache
def update_with_traced(name):
    return jax.jit(lambda x: updated(jadam.adam(1e-3, **{name: x}))[0]["w"])


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_traced_out_of_range_is_nan_not_silence(name, value):
    # Traced values cannot raise, so the updates become NaN, which the loss and apply_if_finite show.
    fine = (name, value) == ("eps", 1.5)
    assert np.isnan(update_with_traced(name)(value)).all() != fine


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_scheduled_out_of_range(name):
    tx = jadam.adam(1e-3, **{name: lambda count: 0.5 + 0.5 * count})  # traced: 0.5, then 1
    state = tx.init(W)
    first, state = jax.jit(tx.update)(W, state)
    second, _ = jax.jit(tx.update)(W, state)
    assert np.isfinite(first["w"]).all()
    assert np.isnan(second["w"]).all()
    tx = jadam.adam(1e-3, **{name: lambda count: 1.0})  # a Python number raises at once
    with pytest.raises(ValueError, match=f"{name} must be in \\[0, 1\\), got 1"):
        tx.update(W, tx.init(W))


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_traced_rate_out_of_range_is_seen(name):
    """A negative learning rate would ascend: NaN updates."""
    p = np.ones((8, 8), np.float32)
    makers = {"adamw": jadam.adamw, "by_path": lambda **how: jadam.by_path([("", {})], **how)}
    kinds = {"scalar": lambda v: v, "schedule": lambda v: lambda count: v}

    @jax.jit
    def updates(v):
        txs = {
            (maker, kind): makers[maker](**{"learning_rate": 1e-3, name: kinds[kind](v)})
            for maker in makers
            for kind in kinds
        }
        return {row: tx.update(p, tx.init(p), p)[0] for row, tx in txs.items()}

    for row, u in updates(-1.0).items():
        assert np.isnan(u).all(), row
    for row, u in updates(0.5).items():
        assert np.isfinite(u).all(), row


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_a_state_restored_without_its_types_can_be_rebuilt(moments):
    """As the error's text says."""
    tx, params = jadam.adam(1e-3, moments=moments), {"a": 1.0, "b": {"c": 2.0}}
    state = tx.update(params, tx.init(params), params)[1]
    names = {"jax": jax, "tx": tx, "params": params, "state": json.loads(json.dumps(jax.tree.map(float, state)))}
    jax.tree.map(np.testing.assert_array_equal, eval(REBUILD, names), state)


def test_a_state_in_the_place_of_parameters():
    p = {"w": ones(3)}
    for tx in (jadam.adam(1e-3), jadam.chain(jadam.clip(1.0), jadam.adam(1e-3))):
        with pytest.raises(TypeError, match=r"state must be the tuple of 2 .* got dict of 1"):
            jadam.step(tx, p, p, tx.init(p))
