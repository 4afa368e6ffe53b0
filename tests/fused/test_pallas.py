"""The TPU kernel in Pallas's interpreter; ``python -m benchmarks aot`` compiles it for the hardware."""

import dataclasses
import functools

import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_finite, assert_steps_agree, make_optimizer, ones, parametrize, unwrap_exact_bf16

import jadam
from jadam._fused import pallas
from jadam._fused import step as _step
from jadam._transformation.transformation import Shard, as_state_arrays, update_leaf

SOME_RULES = ["adam", "adam, scheduled b1", "nadamw, momentum", "adamw, masked", "both"]
CASES = {f"{name}-int8": (name, "int8") for name in SOME_RULES}
CASES |= {f"{name}-bfloat16": (name, "bfloat16") for name in ("adam", "amsgrad", "radam of nadam")}

# A partial last block; rows so narrow that a TPU's layout is transposed; one in which the first axis is next to last.
SHAPES = {"a": (40, 300), "b": (4100, 16), "c": (8, 20, 130)}
random_tree = functools.partial(helpers.random_tree, shapes=SHAPES)


@functools.cache
def interpreted_steps(tx):
    """`jadam.step` with the interpreted kernel, and `update_and_apply`, each jitted."""

    def one_pass(tx, grads, state, params):
        leaf_updates, finish = tx.update.leafwise(grads, state, params)
        grads, (params, structure) = jax.tree.leaves(grads), jax.tree.flatten(params)
        rows = pallas.run_kernel(leaf_updates, grads, params, interpret=True)
        rows = [row or update_leaf(*x) for row, *x in zip(rows, leaf_updates, grads, params, strict=True)]
        return structure.unflatten([p for p, _ in rows]), finish([stored for _, stored in rows])

    return [jax.jit(functools.partial(f, tx)) for f in (one_pass, _step.update_and_apply)]


def count_pallas_calls(tx, grads, state, params):
    return str(jax.make_jaxpr(interpreted_steps(tx)[0])(grads, state, params)).count("pallas_call[")


@parametrize("case", CASES, default=[], slow=["adam-int8", "nadamw, momentum-int8", "amsgrad-bfloat16"])
def test_kernel_matches_update_and_apply(case):
    rule, moments = case
    tx = make_optimizer(rule, moments)
    step, update_and_apply = interpreted_steps(tx)
    params = random_tree(0)
    state = tx.init(params)
    for t in range(3):
        grads = random_tree(t + 1)
        expected = update_and_apply(grads, state, params)
        # 4 ulp as for the portable CPU kernel: XLA may contract other products in each.
        assert_steps_agree(step(grads, state, params), expected, (params, state), moments == "int8", 4)
        params, state = expected
    assert count_pallas_calls(tx, grads, state, params) == 3


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
def test_bf16_weights_with_remainder(moments):
    tx = jadam.exact_bf16(jadam.adamw(1.0, moments=moments))
    step, update_and_apply = interpreted_steps(tx)
    params, state = jax.jit(lambda masters: jadam.from_float32(masters, tx))(random_tree(0))
    for t in range(3):
        grads = random_tree(t + 1, jnp.bfloat16)
        expected = update_and_apply(grads, state, params)
        results = (unwrap_exact_bf16(*x) for x in (step(grads, state, params), expected, (params, state)))
        assert_steps_agree(*results, moments == "int8", 4)
        params, state = expected
    assert count_pallas_calls(tx, grads, state, params) == 3


PARTS = [  # moments, whether there is a remainder, shape of the whole, start and shape of the part
    ("int8", True, (2, 4, 64, 256), (0, 2, 32, 128), (2, 2, 32, 128)),  # leading axes are merged to rows
    ("bfloat16", False, (5, 40, 24, 384), (1, 8, 8, 128), (3, 17, 16, 256)),  # a loop over leading axes
    pytest.param("int8", False, (3, 4, 24, 384), (1, 2, 8, 128), (2, 2, 16, 256), marks=pytest.mark.slow),
    pytest.param("int8", False, (40, 200, 300), (8, 50, 0), (16, 135, 300), marks=pytest.mark.nightly),
    pytest.param("int8", False, (4, 512, 64), (2, 128, 0), (2, 300, 64), marks=pytest.mark.nightly),  # transposed
    pytest.param("int8", False, (3, 256, 4, 64), (1, 0, 2, 0), (2, 256, 2, 64), marks=pytest.mark.slow),
    pytest.param("int8", False, (256, 128, 4), (0, 64, 0), (256, 64, 4), marks=pytest.mark.nightly),
    pytest.param("bfloat16", True, (256, 128, 4), (0, 64, 1), (256, 64, 3), marks=pytest.mark.nightly),
    pytest.param("bfloat16", False, (2, 4, 64, 256), (0, 2, 32, 128), (2, 2, 32, 128), marks=pytest.mark.slow),
    pytest.param("float32", True, (9, 7, 5, 3, 4), (1, 2, 0, 1, 1), (8, 4, 5, 1, 3), marks=pytest.mark.nightly),
    pytest.param("bfloat16", True, (8192,), (2048,), (3072,), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("moments", "has_remainder", "whole", "start", "shape"), PARTS)
def test_a_part_is_that_of_the_whole(moments, has_remainder, whole, start, shape):
    """The step of a shard, cut along several axes, is that part of XLA's step of the whole array."""
    tx = jadam.adamw(1.0, moments=moments)
    tx = jadam.exact_bf16(tx) if has_remainder else tx
    whole_tree = functools.partial(
        random_tree, dtype=jnp.bfloat16 if has_remainder else np.float32, shapes={"a": whole}
    )
    shard = Shard(jnp.uint32(np.ravel_multi_index(start, whole)), whole)

    cut = functools.partial(helpers.cut_part, whole, start, shape)
    with_master = functools.partial(helpers.with_master, has_remainder)

    @jax.jit
    def steps(grads, state, params):
        """The step of the part, the part of the step of the whole, and the part before the step."""
        (leaf,), g, p = tx.update.leafwise(grads, state, params).leaf_updates, grads["a"], params["a"]
        before = as_state_arrays((leaf.stored, leaf.remainder))
        remainder = None if leaf.remainder is None else cut(leaf.remainder)
        part = leaf._replace(stored=tuple(map(cut, leaf.stored)), remainder=remainder, shard=shard)
        (new,) = pallas.run_kernel([part], [cut(g)], [cut(p)], interpret=True)
        expected = jax.tree.map(cut, (update_leaf(leaf, g, p), (p, before)))
        return with_master(*new), *(with_master(*x) for x in expected)

    params = whole_tree(0)
    _, state = jax.jit(functools.partial(jadam.step, tx))(params, tx.init(params), params)
    assert_steps_agree(*steps(whole_tree(1), state, params), moments == "int8", 4)


def test_comparison_detects_a_wrong_seed():
    """Another dither seed rounds otherwise and fails the comparison."""
    tx = make_optimizer("adam", "int8")
    shapes = {"a": SHAPES["a"]}
    params, grads = (random_tree(seed, shapes=shapes) for seed in range(2))
    state = tx.init(params)
    plan = tx.update.leafwise

    def moved(*args):
        leaf_updates, finish = plan(*args)
        return type(plan(*args))(
            [leaf_update._replace(salt=leaf_update.salt + 1) for leaf_update in leaf_updates], finish
        )

    other = type(tx)(tx.init, dataclasses.replace(tx.update, leafwise=moved))
    new = interpreted_steps(other)[0](grads, state, params)
    with pytest.raises(AssertionError):
        assert_steps_agree(new, interpreted_steps(tx)[1](grads, state, params), (params, state))


@pytest.mark.slow
def test_not_finite():
    """Non-finite values and blocks are those of `update_and_apply`."""
    tx = make_optimizer("adam", "int8")
    step, update_and_apply = interpreted_steps(tx)
    params, grads = random_tree(0), random_tree(1)
    a = np.array(grads["a"])
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 1e30, 1e-30, -0.0)):
        a[i, 50 * i] = bad
    grads["a"] = jax.device_put(a)
    state = tx.init(params)
    for _ in range(2):
        new, expected = step(grads, state, params), update_and_apply(grads, state, params)
        assert_same_finite(new, expected)
        params, state = expected


def test_reasons_not_to_use_the_kernel():
    params = {"a": ones((64, 128)), "b": ones((4, 64, 128)), "c": ones(7)}

    def why(platform, tx):
        rows = _step.why_leaves_not_fused(platform, tx, params, jax.eval_shape(tx.init, params), params)
        return [reason for _, reason in rows]

    vector = "the TPU kernel needs 2 dimensions or a multiple of 1024 elements, got shape (7,)"
    assert why("tpu", jadam.adam(1.0)) == why("cuda", jadam.adam(1.0)) == [None] * 3
    assert why("cuda", jadam.adam(1.0, moments="int8")) == [None] * 3  # the vector is float32
    assert why("tpu", jadam.adam(1.0, moments="int8")) == [None] * 3
    assert why("tpu", jadam.adam(1.0, moments="bfloat16")) == [None, None, vector]


def test_kernels_turned_off(monkeypatch):
    """In float32 XLA's own step is one pass too, so there is no reason to report."""
    params = ones((64, 128))
    for moments, reason in (("float32", None), ("int8", "JADAM_KERNELS=xla")):
        tx = jadam.adam(1.0, moments=moments)
        monkeypatch.setenv("JADAM_KERNELS", "xla")
        assert _step.why_leaves_not_fused("cuda", tx, params, tx.init(params), params) == [(None, reason)]


def test_lowers_for_an_absent_platform(monkeypatch):
    tx = jadam.adam(1.0, moments="int8")
    params = ones((64, 128))
    args = jax.eval_shape(lambda: (params, tx.init(params), params))

    def lowered():
        step = jax.jit(functools.partial(jadam.step, tx))
        allow = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
        return jax.export.export(step, platforms=["tpu"], disabled_checks=allow)(*args).mlir_module()

    assert "tpu_custom_call" in lowered()
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    assert "tpu_custom_call" not in lowered()
