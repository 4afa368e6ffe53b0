"""Property-based tests: random trees, shapes, dtypes, hyperparameters and gradients."""

import dataclasses
import decimal
import functools
import math

import family
import handler
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import INT8_OPTIMIZERS, RSQRT_ERROR, ULPS, lowbias32, needs_kernel, round_to_bfloat16
from helpers import MEMBERS as BY_NAME
from hypothesis import assume
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from properties import BETAS, NUMBERS, SEEDS, any_floats, moderate_floats, parts, property_test

import jadam
from jadam._core import numerics
from jadam._fused import step as _step
from jadam._moments import int8
from jadam._transformation.transformation import Shard

E24 = 2.0**-24  # largest relative error of rounding to float32
MEMBERS = [(m.name, x) for m in family.FAMILY for x in ("float32", "bfloat16")] + [
    (name, "int8") for name in INT8_OPTIMIZERS
]
RULES = [("adam", "float32"), ("nadam", "bfloat16"), ("adamax", "float32"), ("amsgrad", "bfloat16"), ("adamw", "int8")]
NOT_RADAM = [m for m in family.FAMILY if m.name != "radam"]  # near its threshold a rounding error becomes a jump
EPS = st.sampled_from([0.0, 1e-8, 1e-30, 1.0]) | st.floats(0, 1e18)


# -- trees, shapes and dtypes ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: object
    bias: object


def trees(leaf):
    """Strategy: pytrees of ``leaf`` and None, of all kinds of nodes, Flax NNX states among them."""
    node = leaf | st.none()

    def deeper(tree):
        names = st.sampled_from(["w", "b", "kernel", "0"])
        return (
            st.dictionaries(names, tree, max_size=3)
            | st.lists(tree, max_size=3).map(tuple)
            | st.lists(tree, max_size=2)
            | st.builds(Layer, tree, tree)
            | st.dictionaries(names, leaf.map(nnx.Param), min_size=1, max_size=2).map(nnx.State)
        )

    return st.recursive(node, deeper, max_leaves=5).filter(lambda tree: tree is not None)


AXES = st.sampled_from([0, 1, 2, 3, 7, 16, 33, 128, 129, 257, 300])
SHAPES = st.lists(AXES, max_size=3).map(tuple) | st.sampled_from([(), (0,), (1,), (4, 0), (33, 300), (64, 129)])
REAL = [np.dtype(x) for x in (jnp.bfloat16, np.float16, np.float32, np.float64)]
COMPLEX = [np.dtype(x) for x in (np.complex64, np.complex128)]


@st.composite
def abstract_leaves(draw):
    """Strategy: a parameter's shape and dtype, and its gradient's dtype."""
    kinds = draw(st.sampled_from([REAL, REAL, COMPLEX]))
    p, g = draw(st.tuples(*[st.sampled_from(kinds)] * 2))
    return jax.ShapeDtypeStruct(draw(SHAPES), p), g


def dtypes_of_state(moments, p, shape):
    """Dtypes of ``mu`` and ``nu`` according to the docstrings of `scale_by_adam` and the formats."""
    wide = jnp.promote_types(p, np.float32)
    narrow = wide == np.float32
    if moments == "bfloat16" and narrow:
        return jnp.bfloat16, jnp.bfloat16
    if moments == "int8" and narrow and len(shape) >= 2 and math.prod(shape) >= 4096 and shape[-1] >= 4:
        return np.int8, np.uint8
    return wide, np.zeros([], wide).real.dtype


def avals(tree):
    return jax.tree.structure(tree), [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


@pytest.mark.usefixtures("x64")
@property_test(
    tree=trees(abstract_leaves()).filter(lambda x: x is not None),
    member=st.sampled_from(MEMBERS),
    rate=st.sampled_from([0.1, lambda count: 0.1]),
)
def test_structure_and_dtypes_are_a_fixed_point(tree, member, rate):
    """Updates have the gradient's dtype promoted with the parameter's; the state keeps its structure and dtypes."""
    is_pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], jax.ShapeDtypeStruct)
    params = jax.tree.map(lambda x: x[0], tree, is_leaf=is_pair)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x[0].shape, x[1]), tree, is_leaf=is_pair)
    name, moments = member
    tx = BY_NAME[name].make(rate, moments=moments)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert avals(after) == avals(state)
    assert not any(x.weak_type for x in jax.tree.leaves((updates, state)))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    rows = [jax.tree.leaves(x) for x in (updates, grads, params, *(optax.tree.get(state, x) for x in ("mu", "nu")))]
    for u, g, p, mu, nu in zip(*rows, strict=True):
        assert (u.shape, u.dtype) == (p.shape, jnp.promote_types(g.dtype, p.dtype))
        assert (mu.dtype, nu.dtype) == dtypes_of_state(moments, p.dtype, p.shape)
        assert mu.shape == nu.shape == p.shape


STEPS = 4
SHAPE = (5, 7)
LARGE = (32, 129)  # int8 needs 4,096 elements; the last block is of one

# Few shapes and dtypes: eager operations are compiled for each.
FEW_SHAPES = [(), (0,), (7,), SHAPE]
DTYPES = [jnp.bfloat16, np.float16, np.float32, np.complex64]


@st.composite
def leaves(draw, shapes=FEW_SHAPES, dtypes=DTYPES):
    """Strategy: a parameter and two gradients."""
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    numbers = draw(st.lists(NUMBERS, max_size=3))
    seeds = draw(st.lists(SEEDS, min_size=4, max_size=4))
    p, g, h, imaginary = (any_floats(shape, seed, numbers) for seed in seeds)
    if dtype == np.complex64:
        return tuple(jnp.asarray(with_imaginary(x, imaginary)) for x in (p, g, h))
    with np.errstate(over="ignore", invalid="ignore"):
        return tuple(jnp.asarray(x.astype(dtype)) for x in (p, g, h))


def with_imaginary(x, y):
    """``x + 1j * y``; the product would turn infinities into NaN."""
    return np.stack([x, y], -1).astype(np.float32).view(np.complex64)[..., 0]


def run_updates(tx, params, *gradients):
    """Updates for each of ``gradients``, and the last state."""
    state, updates = tx.init(params), []
    for g in gradients:
        u, state = tx.update(g, state, params)
        updates.append(u)
    return updates, state


@functools.cache
def compiled_update(name, moments):
    """``init`` and a jitted ``update(settings, *args)`` whose hyperparameters are traced."""

    def update(settings, *args):
        return BY_NAME[name].make(1.0, moments=moments, **settings).update(*args)

    return BY_NAME[name].make(1.0, moments=moments).init, jax.jit(update)


def assert_same_values(a, b):
    """Same structure, dtypes and values; NaN equals NaN and -0 equals 0."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        for part in (np.real, np.imag):
            np.testing.assert_array_equal(*(np.float64(part(np.asarray(z))) for z in (x, y)))


@property_test(few=8, tree=trees(leaves()), member=st.sampled_from(family.FAMILY), b1=BETAS, b2=BETAS, eps=EPS,
       narrow={"tree": trees(leaves([SHAPE], [np.float32, jnp.bfloat16]))})  # fmt: skip
def test_leaves_and_coordinates_are_independent(tree, member, b1, b2, eps):
    """Updates do not depend on other leaves, nor on other coordinates, nor on a coordinate's place.

    Without jit, because XLA may contract other products at the end of an array.
    """
    is_row = lambda x: isinstance(x, tuple) and len(x) == 3 and all(isinstance(y, jax.Array) for y in x)
    params, *gradients = (jax.tree.map(lambda x, i=i: x[i], tree, is_leaf=is_row) for i in range(3))
    tx = member.make(0.1, b1=b1, b2=b2, eps=eps)
    with jax.disable_jit():
        updates, state = run_updates(tx, params, *gradients)
    assert optax.tree.get(state, "count") == 2
    moments = [optax.tree.get(state, x) for x in ("mu", "nu")]
    rows = [jax.tree.leaves(x) for x in (params, *gradients, *updates, *moments)]
    for p, g, h, *results in zip(*rows, strict=True):
        turned = lambda x: np.asarray(x)[::-1] if x.ndim else np.asarray(x)
        kept = np.arange(p.size).reshape(p.shape) % 2 == 0
        with jax.disable_jit():
            alone, own = run_updates(tx, *(jnp.asarray(turned(np.where(kept, x, x.dtype.type(1)))) for x in (p, g, h)))
        alone += [optax.tree.get(own, x) for x in ("mu", "nu")]
        assert_same_values([turned(x)[turned(kept)] for x in results], [np.asarray(x)[turned(kept)] for x in alone])


# -- the numbers -------------------------------------------------------------------------------------------------------


def bound(b1, b2, t):
    """Supremum of |update| at step ``t`` over all gradients, for eps = 0.

    With weights ``w_k = (1-b1) b1**k`` of ``g_(t-k)`` in ``m`` and ``W_k = (1-b2) b2**k`` of its square in ``v``,
    ``m**2 <= v * sum(w_k**2 / W_k)`` by Cauchy & Schwarz, with equality for ``g_(t-k)`` proportional to ``w_k / W_k``.
    The paper's section 2.1 has two special cases: 1 for a constant gradient, (1-b1) / sqrt(1-b2) for a single nonzero
    gradient.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        b1, b2, k = np.float64(b1), np.float64(b2), np.arange(t)
        total = np.sum(np.where(k == 0, 1.0, (b1 / np.sqrt(b2)) ** (2 * k))) if b1 else 1.0
        return (1 - b1) / -np.expm1(t * np.log(b1)) * np.sqrt(total * -np.expm1(t * np.log(b2)) / (1 - b2))


# Betas below 2**-126 are 0 in float32. Up to 1 - 2**-24 the oracle's 1 - b**t has a relative error of 2**-29, and
# products with 1 - b are normal numbers, as |g| >= 2e-15.
PLAIN_BETAS = BETAS.filter(lambda b: b == 0 or 2.0**-126 <= b <= 1 - 2.0**-24)


@property_test(seeds=st.lists(SEEDS, min_size=STEPS, max_size=STEPS), b1=PLAIN_BETAS, b2=PLAIN_BETAS,
       pattern=st.sampled_from(["any", "constant", "worst"]))  # fmt: skip
def test_bound_of_the_update(seeds, pattern, b1, b2):
    gradients = [moderate_floats(SHAPE, seed) for seed in seeds]
    if pattern == "constant":
        gradients = [gradients[0]] * STEPS
    if pattern == "worst" and b1 > 0 and 0.01 < b2 / b1 < 100:  # equality, see `bound`
        start = moderate_floats(SHAPE, seeds[0], smallest=2.0**-8, largest=2.0**8)
        gradients = [np.float32(start * (b2 / b1) ** t) for t in range(STEPS)]
    tx = jadam.scale_by_adam(b1, b2, eps=0.0)
    for t, u in enumerate(run_updates(tx, jnp.zeros(SHAPE), *map(jnp.asarray, gradients))[0], start=1):
        # Roundings as counted in test_the_papers_arithmetic.
        assert np.abs(u).max() <= bound(b1, b2, t) * (1 + (6 * t + 20) * E24)
        if pattern == "constant":
            np.testing.assert_allclose(np.abs(u), 1, rtol=(6 * t + 20) * E24)
    assert np.isfinite(u).all()


@property_test(seeds=st.lists(SEEDS, min_size=STEPS, max_size=STEPS), member=st.sampled_from(family.FAMILY),
       b1=PLAIN_BETAS, b2=PLAIN_BETAS, eps=EPS)  # fmt: skip
def test_the_papers_arithmetic(seeds, member, b1, b2, eps):
    """Every member against its oracle in float64, with gradients between 2e-15 and 6e17.

    Error bound of the direction, in units of e = 2**-24, relative to the direction for the gradients |g|:

    * EMA: a step rounds the sum (1), and factor, difference and product of the other term (3; its coefficient is at
      most 1/2, so the term is no larger than the result). After t steps 4t; for v one more, of g * g.
    * Corrections: 8, by `test_one_minus_power`. Hence m / correction has 4t + 9, v / correction 4t + 10.
    * sqrt halves that and adds 1. eps and its addition add 2, the quotient 1, the learning rate 1. Sum: 6t + 18.
    * NAdam's second term adds 4; the maxima of AMSGrad and AdaMax add none: 6t + 22.
    * RAdam's rectification: rho has 30, which rho - 4 multiplies by 5 and rho - 2 by 2; half of their sum: 200 more.
    """
    settings = {"b1": b1, "b2": b2, "eps": eps}
    more = 22
    if member.name == "radam":
        assume(b2 <= 0.9999)  # up to there the oracle's rho is good to 1e-8
        with np.errstate(divide="ignore"):
            rho_inf, t = 2 / (1 - b2) - 1, np.arange(1, STEPS + 1)
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        assume(np.abs(rho - 4.5).min() > 1e-3 and rho_inf > 4.01)
        settings, more = {**settings, "threshold": 4.5}, 222
    gradients = [moderate_floats(SHAPE, seed) for seed in seeds]
    found, _ = run_updates(member.make(1.0, **settings), jnp.zeros(SHAPE), *map(jnp.asarray, gradients))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected, of_sizes = (member.oracle(x, **settings) for x in (gradients, [np.abs(g) for g in gradients]))
    for t, (u, e, size) in enumerate(zip(found, expected, of_sizes, strict=True), start=1):
        error = np.abs(np.asarray(u, np.float64) + e)
        assert np.all(error <= (6 * t + more) * E24 * size + 1e-37), (
            np.max(error / size) / E24
        )  # XLA flushes below 1e-37


@pytest.mark.usefixtures("x64")
@property_test(seeds=st.lists(SEEDS, min_size=STEPS, max_size=STEPS), member=st.sampled_from(NOT_RADAM),
       b1=BETAS.filter(lambda b: b <= 0.99), b2=BETAS.filter(lambda b: b <= 0.99), eps=EPS,
       narrow={"member": st.sampled_from([BY_NAME[name] for name in ("adam", "nadam", "amsgrad")])})  # fmt: skip
def test_the_papers_arithmetic_in_float64(seeds, member, b1, b2, eps):
    """The same in float64. The oracle's 1 - b**t has an error of 2**-53 / (1-b) <= 100 roundings, twice."""
    gradients = [np.float64(moderate_floats(SHAPE, seed)) for seed in seeds]
    settings = {"b1": b1, "b2": b2, "eps": eps}
    init, update = compiled_update(member.name, "float32")
    take = optax.GradientTransformation(init, functools.partial(update, settings))
    found, state = run_updates(take, np.zeros(SHAPE), *gradients)
    assert optax.tree.get(state, "nu").dtype == np.float64
    with np.errstate(divide="ignore", invalid="ignore"):
        expected, of_sizes = (member.oracle(x, **settings) for x in (gradients, [np.abs(g) for g in gradients]))
    for t, (u, e, size) in enumerate(zip(found, expected, of_sizes, strict=True), start=1):
        assert np.all(np.abs(u + e) <= (12 * t + 222) * 2.0**-53 * size)  # both sides round in float64: twice 6t


@st.composite
def cases(draw, of=MEMBERS):
    """Strategy: a member, its format, a shape and betas; for int8 such betas that |m| / sqrt(v) is bounded."""
    name, moments = draw(st.sampled_from(of))
    b1, b2 = draw(BETAS), draw(BETAS)
    if moments == "int8":
        assume(b1 * b1 < b2 and b2 >= 2.0**-126)
    return name, moments, LARGE if moments == "int8" else SHAPE, {"b1": b1, "b2": b2}


FEW_CASES = {"case": cases(RULES)}


def run_compiled_updates(name, moments, settings, params, *gradients):
    """`run_updates` of a member, with one program for all settings."""
    settings = {name: np.float32(min(x, 1 - E24) if name in ("b1", "b2") else x) for name, x in settings.items()}
    assume(moments != "int8" or settings["b1"] ** 2 < 0.999999 * settings["b2"])
    init, update = compiled_update(name, moments)
    return run_updates(optax.GradientTransformation(init, functools.partial(update, settings)), params, *gradients)


@property_test(few=12, case=cases(), eps=EPS, seeds=st.lists(SEEDS, min_size=3, max_size=3),
       numbers=st.lists(NUMBERS, max_size=5), narrow=FEW_CASES)  # fmt: skip
def test_sign_flip(case, eps, seeds, numbers):
    """Negating parameter and gradients negates updates and ``mu`` and keeps ``nu``."""
    name, moments, shape, betas = case
    take = functools.partial(run_compiled_updates, name, moments, {**betas, "eps": eps})
    gradients = [any_floats(shape, seed, numbers) for seed in seeds]
    p = moderate_floats(shape, seeds[0])
    updates, state = take(p, *gradients)
    others, other = take(-p, *(-g for g in gradients))
    assert_same_values(updates, [-np.asarray(x) for x in others])
    mu, nu = ([np.asarray(optax.tree.get(s, name)) for s in (state, other)] for name in ("mu", "nu"))
    if mu[0].dtype == np.int8:  # sign and magnitude; 0 may have either sign, and NaN has none
        np.testing.assert_array_equal(mu[0] & 0x7F, mu[1] & 0x7F)
        finite = np.isfinite(np.repeat(np.asarray(optax.tree.get(state, "mu_scale")), 128, axis=-1)[:, : shape[1]])
        signed = finite & (mu[0] & 0x7F != 0)
        np.testing.assert_array_equal((mu[0] < 0) & signed, (mu[1] >= 0) & signed)
    else:
        assert_same_values(mu[0], -mu[1])
    assert_same_values(*nu)


@property_test(seeds=st.lists(SEEDS, min_size=3, max_size=3), turns=st.integers(1, 3), b1=BETAS, b2=BETAS, eps=EPS,
       numbers=st.lists(NUMBERS.filter(math.isfinite), max_size=3))  # fmt: skip
def test_quarter_turns(seeds, turns, b1, b2, eps, numbers):
    """Multiplying complex gradients by i multiplies updates by i and keeps ``nu``.

    Without jit, because XLA may contract the square of either part with the sum.
    """
    gradients = [
        with_imaginary(moderate_floats(SHAPE, s, numbers), moderate_floats(SHAPE, s + 1, numbers)) for s in seeds
    ]
    turned = gradients
    for _ in range(turns):
        turned = [with_imaginary(-g.imag, g.real) for g in turned]
    tx, zeros = jadam.scale_by_adam(b1, b2, eps), jnp.zeros(SHAPE, np.complex64)
    with jax.disable_jit():
        updates, state = run_updates(tx, zeros, *map(jnp.asarray, gradients))
        others, other = run_updates(tx, zeros, *map(jnp.asarray, turned))
    assert_same_values(state.nu, other.nu)
    for u, v in zip(map(np.asarray, updates), map(np.asarray, others), strict=True):
        parts, found = [u.real, u.imag], [v.real, v.imag]
        for _ in range(turns):
            parts = [-parts[1], parts[0]]
        finite = np.isfinite(u) & np.isfinite(v)  # beyond float32's range a quotient of complex numbers may be NaN
        for x, y in zip(parts, found, strict=True):
            np.testing.assert_array_equal(x[finite], y[finite])


@property_test(case=cases([x for x in MEMBERS if x[0] != "radam"]), seeds=st.lists(SEEDS, min_size=3, max_size=3),
       k=st.integers(-20, 20), narrow=FEW_CASES)  # fmt: skip
def test_powers_of_two(case, seeds, k):
    """With eps = 0, scaling gradients by 2**k changes no bit of updates, int8 codes and significands.

    Gradients are so large that all products are normal numbers: (1-b2) * g * g >= 2**-125. A difference from the
    average may underflow, but only if it is below half an ulp of the average, as g * g >= 2**-98. int8's lowest level
    of v is 2**-64 of the block's maximum, so its gradients start at 2**-20. RAdam's first steps are m_hat, which does
    scale.
    """
    name, moments, shape, betas = case
    b1, b2 = betas.values()
    assume(b1 <= 1 - 2.0**-40)
    if moments == "int8":
        assume(b2 <= 0.99999)
        sizes = 2.0**-20, 2.0**20
    else:
        sizes = max(2.0**-49, 2.0**-62.5 / math.sqrt(1 - b2)), 2.0**59
    low, high = sizes[0] * 2.0 ** max(-k, 0), sizes[1] * 2.0 ** min(-k, 0)
    assume(low <= high)
    take = functools.partial(run_compiled_updates, name, moments, {**betas, "eps": 0.0}, np.zeros(shape, np.float32))
    gradients = [moderate_floats(shape, seed, smallest=low, largest=high) for seed in seeds]
    updates, state = take(*gradients)
    others, other = take(*(np.ldexp(g, k) for g in gradients))
    assert_same_values(updates, others)
    of = lambda field: [np.asarray(optax.tree.get(x, field)) for x in (state, other)]
    if moments == "int8":
        for field in ("mu", "nu", "mu_scale"):
            assert_same_values(*of(field))
        a, b = of("nu_scale")
        np.testing.assert_array_equal(np.ldexp(a, 2 * k), b)
    else:
        power = k if name.startswith("adamax") else 2 * k
        for field, by in (("mu", k), ("nu", power)):
            a, b = (np.float32(x) for x in of(field))
            np.testing.assert_array_equal(np.ldexp(a, by), b)


# -- underflow and overflow --------------------------------------------------------------------------------------------

TINY = st.floats(2.0**-149, 2.0**-64, width=32)  # 5e-20


@property_test(numbers=st.lists(TINY, min_size=1, max_size=8), b1=BETAS, b2=BETAS.filter(lambda b: b > 0.5), eps=EPS,
       seed=SEEDS)  # fmt: skip
def test_below_the_range(numbers, b1, b2, eps, seed):
    """For |g| < 1e-19 the update is at most m_hat / eps, or m_hat if eps is 0, and has the right sign."""
    tx = jadam.scale_by_adam(b1, b2, eps)
    g = np.resize(np.float32(numbers), SHAPE)
    g = jnp.asarray(g * np.random.default_rng(seed).choice(np.float32([-1, 1]), SHAPE))
    state = tx.init(g)
    for t in range(1, 4):
        u, state = tx.update(g, state)
        # XLA flushes subnormal numbers to 0 on a CPU: b1 * g may be lost before the division by 1 - b1 >= 1/2
        least = np.float32(eps) if eps >= 2.0**-126 else 1.0
        assert np.all(
            np.abs(u) <= (np.abs(g) + 8 * 2.0**-126) / least * (1 + 30 * E24) + 1e-37
        )  # roundings as above, 6t + 12
        assert np.all(np.asarray(u) * np.sign(g) >= 0)
        assert np.all(np.asarray(state.nu) < 2.0**-126)
        assert t == state.count


@property_test(size=st.floats(9 * 2.0**61, 2.0**128 - 2.0**104, width=32), sign=st.sampled_from([-1, 1]),
       b1=BETAS, b2=BETAS, seed=SEEDS)  # fmt: skip
def test_above_the_range(size, sign, b1, b2, seed):
    """For |g| > 2e19 ``nu`` becomes inf and the update 0, then NaN; with b2 < 1/2 NaN at once."""
    tx = jadam.scale_by_adam(b1, b2)
    g = moderate_floats(SHAPE, seed)
    bad = np.zeros(SHAPE, bool)
    bad[1, 2] = True
    _, state = tx.update(jnp.asarray(g), tx.init(jnp.zeros(SHAPE)))
    u, state = tx.update(jnp.asarray(np.where(bad, np.float32(size * sign), g)), state)
    if np.float32(b2) >= 0.5:
        assert (u[1, 2], state.nu[1, 2]) == (0, np.inf)
        u, state = tx.update(jnp.asarray(g), state)
    assert np.isnan(u[1, 2])
    assert np.isnan(tx.update(jnp.asarray(g), state)[0][1, 2])
    assert np.isfinite(u)[~bad].all()


@property_test(few=12, bad=st.sampled_from([np.nan, np.inf, -np.inf]), case=cases(), seed=SEEDS,
       narrow={"case": cases([*RULES, ("radam", "float32")])})  # fmt: skip
def test_not_finite(bad, case, seed):
    """NaN and inf stay in their coordinate, with int8 in their block, for all later steps, and spread no further."""
    name, moments, shape, betas = case
    g = moderate_floats(shape, seed, smallest=1e-3, largest=1e3)
    h = g.copy()
    h[1, 2] = bad
    (_, *updates), state = run_compiled_updates(name, moments, betas, np.zeros(shape, np.float32), g, h, g)
    u, after = map(np.asarray, updates)
    of = lambda field: np.asarray(optax.tree.get(state, field))
    held = [of("mu")[1, 2], of("nu")[1, 2], of("mu_scale")[1, :1] if moments == "int8" else np.zeros([])]
    # inf / inf is NaN; but RAdam's first steps are m
    assert np.isnan(u[1, 2]) or (name == "radam" and np.isinf(u[1, 2]))
    assert np.isnan(after[1, 2]) or (name == "radam" and np.isinf(after[1, 2]))
    assert not all(np.isfinite(x).all() for x in held)
    others = np.ones(shape, bool)
    others[1, 2:3] = False
    assert np.isfinite(u)[others].all()
    others[1, : 128 if moments == "int8" else 0] = False
    assert np.isfinite(after)[others].all()


# -- formulas ----------------------------------------------------------------------------------------------------------


def beta_of(b, t=1):
    return numerics.constant_beta(b, jnp.float32(t), np.dtype(np.float32))


FINITE = st.floats(-(2.0**126), 2.0**126, width=32)


@property_test(few=100, b=BETAS, traced=st.booleans(), x=FINITE, y=FINITE)
def test_ema_keeps_a_constant_and_never_overshoots(b, traced, x, y):
    beta = beta_of(jnp.float32(min(b, 1 - E24)) if traced else b)
    x, y = jnp.float32(x), jnp.float32(y)
    x, y = x + 0, y + 0  # XLA flushes subnormal numbers to 0 on a CPU
    assert numerics.ema(beta, x, x) == x
    between = float(numerics.ema(beta, x, y))
    slack = 2.0**-23 * max(abs(float(x)), abs(float(y)))  # an ulp of the larger
    assert min(float(x), float(y)) - slack <= between <= max(float(x), float(y)) + slack


@property_test(few=100, b=BETAS, t=st.integers(1, 100) | st.integers(1, 2**31 - 1))
def test_one_minus_power(b, t):
    """Against 50 digits, to 4 ulp: expm1 2, its argument 1.5 (log b, t and the product), the reference 1/2."""
    with decimal.localcontext(decimal.Context(prec=50, Emin=-decimal.MAX_EMAX, Emax=decimal.MAX_EMAX)):
        exact = float(1 - decimal.Decimal(b) ** t)
    found = float(numerics.one_minus_power(b, jnp.float32(t), jnp.float32))
    if exact >= 2.0**-125:
        assert abs(found - exact) <= 4 * 2.0**-23 * exact
    beta = beta_of(b, t)
    assert float(beta.correction) == found
    assert beta.one_minus_b == np.float32(1.0 - b)
    assert (beta.b, beta.next_b) == (np.float32(b), np.float32(b))


@property_test(few=100, index=SEEDS, salt=SEEDS, t=SEEDS, k=st.integers(0, 5), lane=st.integers(0, 511))
def test_dither(index, salt, t, k, lane):
    """The dither is part of the saved format: a resumed run needs the same bits."""
    start = lowbias32(index ^ lowbias32((salt + k // 2 * 0x632BE5AB) % 2**32))
    start = (start << 16 | start >> 16) % 2**32 if k % 2 else start
    expected = (start + t * 0x9E3779B9) % 2**32
    found = numerics.dither(jnp.full(1, index, jnp.uint32), salt, jnp.uint32(t), k)
    assert (found.dtype, int(found[0])) == (jnp.uint32, expected)
    of_block = numerics.dither_of_block(jnp.uint32(index), jnp.uint32(lane), salt, jnp.uint32(t))
    first = (lowbias32(index ^ lowbias32(salt)) + t * 0x9E3779B9) % 2**32
    assert int(of_block) == (first + lane * 0xC13FA9A9) % 2**32


ALL_HIGH_BITS = np.arange(2**16, dtype=np.uint32) << 16


@property_test(few=50, x=NUMBERS, low=SEEDS)
def test_round_to_bfloat16(x, low):
    """Rounds to a neighbour; over all random bits, away from 0 in proportion to the distance."""
    with np.errstate(over="ignore"):
        x = np.float32(x)
    pattern = int(x.view(np.uint32))
    rounded = np.asarray(round_to_bfloat16(np.full(2**16, x), ALL_HIGH_BITS | np.uint32(low % 2**16)))
    if not np.isfinite(x):
        np.testing.assert_array_equal(np.float32(rounded), np.full(2**16, x))
        return
    near, share = divmod(pattern, 2**16)
    assert set(rounded.view(np.uint16).tolist()) <= {near, near + 1}
    assert np.sum(rounded.view(np.uint16) == near + 1) == share


@property_test(few=20, part=parts())
def test_indices_of_a_part(part):
    """A part's indices are those in the whole array, also from its strides, which are the fewest."""
    whole, starts, sizes = part
    index = np.arange(math.prod(whole), dtype=np.uint32).reshape(whole)
    here = index[tuple(slice(s, s + n) for s, n in zip(starts, sizes, strict=True))]
    part = Shard(jnp.asarray(index[starts]), whole)
    of_whole, of_part = jax.jit(
        lambda start: (numerics.linear_index(whole), Shard(start, whole).global_indices(sizes))
    )(index[starts])
    np.testing.assert_array_equal(of_whole, index)
    np.testing.assert_array_equal(of_part, here)
    strides = part.strides(sizes)
    assert math.prod(size for size, _ in strides) == here.size
    from_strides = [index[starts] + handler.mixed_radix(i, strides) for i in range(here.size)]
    np.testing.assert_array_equal(here.ravel(), from_strides)
    # one digit more for each cut axis, unless the part has one element along the axes before it
    cut = [axis for axis in range(1, len(whole)) if sizes[axis] != whole[axis] and math.prod(sizes[:axis]) > 1]
    assert len(strides) <= 1 + len(cut)


quantize, dequantize = jax.jit(int8.quantize), jax.jit(int8.dequantize)
# Random bits whose low 17 bits, which round r, are an even grid, and so are the high 23 bits, which round v.
GRID = 256


@property_test(few=20, seed=SEEDS, spread=st.floats(0, 6), zeros=st.booleans())
def test_int8_codes(seed, spread, zeros):
    """Codes are neighbours of the exact value and unbiased; v = 0 has the lowest code, and its r is 0."""
    rng = np.random.default_rng(seed)
    s = np.float32(10 ** rng.uniform(-spread, spread, 32))
    s *= rng.random(32) > 0.2 * zeros
    m, v = np.float32(s * rng.uniform(-2, 2, 32)), s * s
    low = np.arange(GRID, dtype=np.uint32) << 9 | rng.integers(0, 2**9, dtype=np.uint32)
    high = rng.permutation(GRID).astype(np.uint32) << 24
    random = (high | low & 0x1FFFF)[:, None] * np.ones(32, np.uint32)
    many = lambda x: np.broadcast_to(x, (GRID, 32))
    rq, vq, r_scale, v_scale = quantize(many(m), many(v), random)
    r = np.divide(np.float64(m), np.sqrt(np.float64(v)), out=np.zeros(32), where=v > 0)
    # float32's own error in r, 2 ulp; v has none
    np.testing.assert_allclose(r_scale, np.full((GRID, 1), np.abs(r).max()), rtol=2 * 2**-23)
    np.testing.assert_array_equal(v_scale, np.full((GRID, 1), v.max()))
    assert np.all(np.asarray(vq)[many(v == 0)] == 1)
    assert np.all((np.asarray(rq) < 0) == (r < 0))
    # every level, from codes in ascending order
    code = np.arange(1, 256)
    x = (code << 17 & 0xFE0000 | 0x40000000).astype(np.uint32).view(np.float32)[:127]
    r_levels = np.concatenate([[0.0], (x.astype(np.float64) - 2) / 5.9375])
    eighth = code.astype(np.float32).view(np.uint32)
    v_levels = ((eighth << np.uint32(3)) + np.uint32(0x23800000)).view(np.float32).astype(np.float64) * 32 / 31
    for found, levels, exact in (
        (np.asarray(rq) & 0x7F, r_levels, np.abs(r) / max(np.abs(r).max(), 1e-30)),
        (np.asarray(vq) - 1, v_levels, np.float64(v) / v.max()),
    ):
        place = np.clip(np.searchsorted(levels, exact * (1 + 1e-6)) - 1, 0, len(levels) - 2)
        gap = levels[place + 1] - levels[place]
        # within a neighbour, and 1e-5 of it for float32's rounding
        assert np.all(levels[found] >= np.where(exact < levels[0], 0, exact - gap * (1 + 1e-3)) - 1e-6 * exact)
        assert np.all(levels[found] <= np.maximum(exact, levels[0]) + gap * (1 + 1e-3) + 1e-6 * exact)
        unbiased = exact > 1e-11  # v has no unbiased rounding below 1e-12 of the largest
        mean = np.mean(levels[found], axis=0)
        # GRID random numbers on an even grid give a share to 1 / GRID; float32 adds some 1e-5
        assert np.all((np.abs(mean - exact) <= gap * (1 / GRID + 1e-3) + 1e-6 * exact)[unbiased])


# -- the same step by kernel, eagerly, and on eight devices ------------------------------------------------------------


TESTED = [("adamw", "int8"), ("amsgrad", "bfloat16"), ("adamw", "float32")]
MORE_TESTED = [("adamw", "bfloat16"), ("nadamw", "float32"), ("nadamw", "int8"), ("amsgrad", "float32")]
MORE_TESTED += [("adamax", "float32")]
MANY = 10_000 // len(TESTED + MORE_TESTED)  # examples of each
LEAVES = {"a": (16, 257), "b": (7,), "c": (), "d": (16,)}


def parametrize_rules(default):
    """Parametrizes over rules and formats: the first ``default`` of `TESTED` run by default."""
    marked = [(*way, () if i < default else pytest.mark.slow) for i, way in enumerate(TESTED)]
    marked += [(*way, pytest.mark.nightly) for way in MORE_TESTED]
    return pytest.mark.parametrize(("name", "moments"), [pytest.param(*way, marks=mark) for *way, mark in marked])


@functools.cache
def compiled_steps(name, moments):
    """``init``, jitted `jadam.step`, jitted and eager `update_and_apply`; hyperparameters are arguments."""
    member = BY_NAME[name]

    def called(f, h, *args):
        return f(member.make(1.0, moments=moments, **h), *args)

    step, calls = (functools.partial(called, f) for f in (jadam.step, _step.update_and_apply))
    init = member.make(1.0, moments=moments).init
    return init, jax.jit(step), jax.jit(calls), calls


@st.composite
def settings_of(draw):
    """Strategy: ``(hyperparameters, seeds, numbers)``, the last two for the gradients."""
    b1, b2 = (min(draw(BETAS), 1 - 2.0**-16) for _ in range(2))
    assume(b1 * b1 < 0.99 * b2 and b2 >= 0.01)
    h = {"b1": b1, "b2": b2, "eps": draw(st.sampled_from([1e-30, 1e-8, 1e-3]))}
    seeds = draw(st.lists(SEEDS, min_size=3, max_size=3))
    # Near float32's maximum one side may round to infinity and the other not.
    numbers = st.lists(NUMBERS.filter(lambda x: not 2.0**126 < abs(x) < math.inf), max_size=5)
    return {k: np.float32(x) for k, x in h.items()}, seeds, draw(numbers)


def ratio_bound(name, h):
    """Bound of |update| at lr 1 in the first steps: as in `jadam._moments.int8`, and at least 1."""
    b1, b2, t = np.float64(h["b1"]), np.float64(h["b2"]), np.arange(1, 4)
    newest = (1 - b1) / np.sqrt(1 - b2)
    ratio = newest / np.sqrt(1 - b1 * b1 / b2)
    adam, nadam = ratio / (1 - b1**t), b1 * ratio / (1 - b1 ** (t + 1)) + newest / (1 - b1**t)
    if name == "adamax":  # |g_(t-k)| is at most u / b2**k
        return max(1.0, np.max((1 - b1) * np.cumsum((b1 / b2) ** (t - 1)) / (1 - b1**t)))
    return max(1.0, np.max((nadam if name.startswith("nadam") else adam) * np.sqrt(1 - b2**t)))


def assert_agree(new, expected, old, max_update, out_of_range, ulps, rsqrt_error=0.0):
    """Compares two results ``(params, state)`` of a step from ``old``, for any hyperparameters.

    * Stored float32: ``ulps`` * 2**-23 * max(|old|, |increment|). For v + (1-b2) * (g*g - v) one side may round all
      four operations, each by 2**-24 of the increment, the other, which contracts the products, only two: 3 ulp.
      AMSGrad stores v / correction, which each side rounds once or twice more: 5 ulp. For usual betas 2 are enough.
    * Updates at lr 1: 5e-7 of the larger of |update| and ``max_update``, because the terms of ``m`` may cancel but not
      their errors. Where a gradient was out of Adam's range (``out_of_range``), only finiteness is compared.
    * bfloat16: one spacing, 2**-7, more. int8: codes differ by at most 1. Both sides use the same random bits, and
      rounding is monotone.
    * The kernel's 1 / sqrt(v) of int8 moments has a relative error up to ``rsqrt_error``, which is also that of updates
      and of the scale of m / sqrt(v).
    """
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for is_param, trees in enumerate(zip(new[::-1], expected[::-1], old[::-1], strict=True)):
        for (path, a), b, c in zip(
            jax.tree_util.tree_leaves_with_path(trees[0]), *map(jax.tree.leaves, trees[1:]), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            dtype, place = a.dtype, jax.tree_util.keystr(path)
            a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b), place)
            with np.errstate(invalid="ignore"):
                close = ulps * 2.0**-23 * np.maximum(np.abs(c), np.abs(b - c)) + 1e-37  # XLA flushes below it
                if is_param:
                    close = close + (5e-7 + rsqrt_error) * np.maximum(max_update, np.abs(b - c))
                    close = np.where(out_of_range[path[0].key], np.inf, close)
                if dtype == jnp.bfloat16:
                    close = close + 2.0**-7 * np.maximum(np.abs(a), np.abs(b))
                if dtype in (jnp.int8, jnp.uint8):
                    close = 1.0  # a code of r has its sign and 7 bits, so -128 is 0
                    a, b = (np.where(x < 0, -128 - x, x) if dtype == jnp.int8 else x for x in (a, b))
                    # codes differ at a rounding threshold; with other random bits a third would
                    assert np.sum(a != b) <= 4 + a.size / 20, place
                if "mu_scale" in place:
                    close = close + rsqrt_error * np.abs(b) + ulps * 2.0**-23 * max_update  # m may cancel
                wrong = np.isfinite(a) & (np.abs(a - b) > close)
            assert not wrong.any(), (place, a[wrong], b[wrong], c[wrong])


def compare(settings_of, name, moments, other, ulps, placed=lambda tree: tree, of=lambda tree: tree, rsqrt_error=0.0):
    """Compares three jitted steps with ``other``, whose arguments are ``placed(of(args))``; ``of`` selects leaves."""
    h, seeds, numbers = settings_of
    init, _, one, _ = compiled_steps(name, moments)
    max_update = ratio_bound(name, h)
    if moments == "int8":
        assume(max_update < 64)  # 2 ulp of the largest ratio are 8 * 2**-22 of 2 + |r|, whose codes are 1/32 apart
    array = lambda make: {k: make(shape, i) for i, (k, shape) in enumerate(LEAVES.items())}
    params = jax.tree.map(jnp.asarray, array(lambda shape, i: moderate_floats(shape, i, smallest=1e-3, largest=1.0)))
    state, out_of_range = init(params), array(lambda shape, i: np.zeros(shape, bool))
    for seed in seeds:
        if moments == "int8":  # its lowest level of v is 2**-64 of the block's maximum
            grads = array(
                lambda shape, i, seed=seed: moderate_floats(shape, seed + i, smallest=2.0**-20, largest=2.0**20)
            )
        else:
            grads = array(lambda shape, i, seed=seed: moderate_floats(shape, seed + i, numbers, smallest=2.0**-40))
        # in range: for |g| >= 2**-40 the increments (1-b2) * g * g and, at a later zero, (1-b2) * v are normal
        out = lambda g: (g != 0) & ~((np.abs(g) >= 2.0**-40) & (np.abs(g) < 1e18)) | (g == 0) & (h["b2"] < 0.5)
        out_of_range = {k: out_of_range[k] | np.asarray(out(g)) for k, g in grads.items()}
        old = params, state
        expected = one(h, jax.tree.map(jnp.asarray, grads), state, params)
        new = other(h, *placed(of((jax.tree.map(jnp.asarray, grads), state, params))))
        assert_agree(new, of(expected), of(old), max_update, out_of_range, ulps, rsqrt_error)
        params, state = expected


def ulps_of(name, moments):
    """As derived in `assert_agree`; int8's scales, of m / sqrt(v), have two more roundings."""
    return 5 if name == "amsgrad" or moments == "int8" else 3


@needs_kernel
@parametrize_rules(default=2)
@property_test(few=5, many=MANY, how=settings_of())
def test_kernel_agrees_with_xla(name, moments, how):
    rsqrt_error = RSQRT_ERROR if moments == "int8" else 0.0
    ulps = ulps_of(name, moments) * ULPS // 2
    compare(how, name, moments, compiled_steps(name, moments)[1], ulps, rsqrt_error=rsqrt_error)


def only(key):
    """Function that keeps only the leaf ``key`` of parameters or a state."""
    is_dict = lambda x: isinstance(x, dict)
    return lambda tree: jax.tree.map(lambda x: {key: x[key]} if is_dict(x) else x, tree, is_leaf=is_dict)


@parametrize_rules(default=1)
@property_test(few=5, many=MANY, how=settings_of(), of=st.just(lambda tree: tree), narrow={"of": st.just(only("a"))})
def test_jit_agrees_with_eager(name, moments, how, of):
    compare(how, name, moments, compiled_steps(name, moments)[3], ulps_of(name, moments), of=of)


@parametrize_rules(default=1)
@property_test(few=5, many=MANY, how=settings_of())
def test_eight_devices_agree_with_one(name, moments, how):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = lambda x: NamedSharding(mesh, P("x") if x.ndim and x.shape[0] == 16 else P())
    placed = lambda tree: jax.tree.map(lambda x: jax.device_put(x, rows(x)), tree)
    compare(how, name, moments, compiled_steps(name, moments)[2], ulps_of(name, moments), placed)
