"""`jadam.statistics` against NumPy in float64, from the state's own arrays."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from family import FAMILY
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam import measuring
from jadam.measuring import LOWER, QUANTILES, UPPER, _quantiles

B1, B2, EPS, RATE, DECAY, STEPS = 0.8, 0.95, 0.3, 0.01, 0.1, 5  # an eps that dominates here and there
MESH = Mesh(np.array(jax.devices()), ("data",))
FORMATS = ["float32", "bfloat16", "int8"]
rate = optax.exponential_decay(RATE, 1, 0.5)  # what a wrong count would get wrong


def tree(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    x = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 2, shape), dtype)
    return {"kernel": x(64, 136), "bias": x(24), "scale": x(), "none": None, "empty": x(0, 4)}


def trained(tx, p, steps=STEPS):
    """After some steps, the last one's updates besides; the first gradients of a column are its only ones."""
    state, updates = tx.init(p), None
    update = jax.jit(tx.update)
    for i in range(steps):
        g = tree(i + 1, p["kernel"].dtype)
        g["kernel"] = g["kernel"].at[:, ::3].multiply(1 if i == 0 else 0)
        updates, state = update(g, state, p)
        p = optax.apply_updates(p, updates)
    return p, state, updates


def moments(state, name):
    """A leaf's ``m, v`` in float64."""
    m, v = (np.asarray(getattr(state, field)[name], np.float64) for field in ("mu", "nu"))
    if state.mu[name].dtype != jnp.int8:
        return m, v
    scales = (np.asarray(getattr(state, field)[name], np.float64) for field in ("mu_scale", "nu_scale"))
    r_scale, s_scale = (np.repeat(x, 128, -1)[..., : m.shape[-1]] for x in scales)
    s = s_scale * (v / 255) ** 4
    return r_scale * np.sign(m) * (m / 127) ** 2 * s, s**2


def expected(m_hat, root, u, p, eps, zero=0.0):
    """The measures, in NumPy."""
    rms = lambda x: np.sqrt(np.mean(np.abs(x) ** 2)) if x.size else 0.0
    mean = lambda x: np.mean(x) if x.size else 0.0
    return {
        "moment_rms": rms(root),
        "update_rms": rms(u),
        "update_ratio": rms(u) / rms(p) if p.size else 0.0,
        "snr": mean(np.abs(m_hat) / np.where(root == 0, 1, root)),
        "eps_share": mean(eps > root),
        "zero_share": zero,
    }


def check(told, wanted, u, n):
    """Scalars and quantiles.

    A sum of n float32 terms >= 0, in whatever order, is off by at most n * 2**-24 of itself, each term by 16 roundings;
    roots halve that. A comparison with eps may fall otherwise for a coordinate within 16 roundings of it: at most one
    here. The quantile lies in the bin of the coordinate that has it, [1, 1.25) of something at the widest; so does
    what is told. 8 roundings may put that coordinate into the next bin, at its edge.
    """
    for name, x in wanted.items():
        share = 1 / max(1, n) if name.endswith("share") else 0
        np.testing.assert_allclose(getattr(told, name), x, rtol=(n + 16) * 2.0**-24, atol=share, err_msg=name)
    if n:
        true = np.quantile(np.abs(u), QUANTILES, method="inverted_cdf")
        assert ((told.step_quantiles >= true / 1.2500012) & (told.step_quantiles <= true * 1.2500012)).all()


def adam(state, name, p, decay=DECAY, decays=True):
    """An Adam's numbers for one leaf at ``STEPS``."""
    m, v = moments(state, name)
    m_hat, v_hat = m / (1 - B1**STEPS), v / (1 - B2**STEPS)
    u = -RATE * 0.5 ** (STEPS - 1) * (m_hat / (np.sqrt(v_hat) + EPS) + decay * decays * p)
    int8 = state.mu[name].dtype == jnp.int8
    zero = np.mean((np.asarray(state.mu[name]) == 0) & (np.asarray(state.nu[name]) != 0)) if int8 else 0.0
    return m_hat, np.sqrt(v_hat), u, zero


def check_all(told, state, p, names, **kwargs):
    rows = []
    for name in names:
        wide = np.asarray(p[name], np.float64)
        m_hat, root, u, zero = adam(state, name, wide, **kwargs)
        check(told.leaves[f"['{name}']"], expected(m_hat, root, u, wide, EPS, zero), u, wide.size)
        rows.append([np.ravel(x) for x in (m_hat, root, u, wide)] + [np.full(wide.size, zero)])
    assert set(told.leaves) == {f"['{name}']" for name in names}
    m_hat, root, u, wide, zero = (np.concatenate(x) for x in zip(*rows, strict=True))
    check(told.total, expected(m_hat, root, u, wide, EPS, zero.mean()), u, wide.size)


NAMES = ["kernel", "bias", "scale", "empty"]


def adamw(moments, b1=B1, **kwargs):
    return jadam.adamw(rate, b1, B2, EPS, weight_decay=DECAY, moments=moments, **kwargs)


HOW = [*(("alone", x) for x in FORMATS), ("chain", "int8"), ("mask", "float32"), ("scheduled betas", "int8")]


@pytest.mark.every(2)
@pytest.mark.parametrize(("how", "moments"), [*HOW, ("record", "bfloat16")])
def test_every_format(how, moments):
    tx = {
        "alone": lambda: adamw(moments),
        "chain": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(2.0), adamw(moments)),
        "mask": lambda: adamw(moments, mask=lambda p: jax.tree.map(lambda x: False, p)),
        "scheduled betas": lambda: adamw(moments, b1=optax.constant_schedule(B1)),
        "record": lambda: jadam.record(adamw(moments), every=2, keep=2),
    }[how]()
    p, state, _ = trained(tx, tree())
    told = jadam.statistics(tx, state, p)
    is_adam = lambda x: hasattr(x, "mu")
    own = next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    check_all(told, own, p, NAMES, decays=how != "mask")
    assert told.total.eps_share > 0.1
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(told))


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_exact_bf16(moments):
    """The masters' numbers."""
    tx = jadam.exact_bf16(jadam.chain(jadam.clip(1.0), adamw(moments)))
    p, state, _ = trained(tx, tree(dtype=jnp.bfloat16))
    masters = jadam.float32_params(p, state)
    told = jadam.statistics(tx, state, p)
    check_all(told, state.inner_state[1][0], masters, NAMES)


def test_by_path_leaves_frozen_ones_out():
    rules = [("bias", jadam.FROZEN), ("scale", {"b1": optax.constant_schedule(B1), "moments": "float32"}), ("", {})]
    tx = jadam.by_path(rules, rate, B1, B2, EPS, weight_decay=DECAY, moments="int8")
    p, state, _ = trained(tx, tree())
    told = jadam.statistics(tx, state, p)
    check_all(told, state.moments, p, ["kernel", "scale", "empty"])


@pytest.mark.slow
def test_zero1():
    """Divided over eight devices, the numbers of one: sums in another order."""
    p = tree()
    tx = jadam.sharding.zero1(adamw("int8"), p, MESH, "data")
    p, state, _ = trained(tx, p)
    alone = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (state, p))
    told = jadam.statistics(tx, state, p)
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(jadam.statistics(adamw("int8"), *alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * 8729 * 2.0**-24)


EXPLICIT = {
    "float32": lambda: adamw("float32"),
    "int8": lambda: adamw("int8"),
    "chain": lambda: jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(2.0), adamw("int8"))),
    "amsgrad": lambda: jadam.amsgrad(1e-2, moments="bfloat16"),
    "by_path": lambda: jadam.by_path([("bias", jadam.FROZEN), ("", {"b1": lambda count: B1})], 1e-2),
}


@pytest.mark.every(11)
@pytest.mark.parametrize("context", [True, False], ids=["in set_mesh", "bare"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_explicit_axes(name, axis, context):
    """Where JAX infers no sharding: the numbers of one device, also of what record keeps, and one compilation."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tx = jadam.record(EXPLICIT[name](), every=2, keep=2, sample=None)
    dtype = jnp.bfloat16 if name == "chain" else jnp.float32
    p, gradients = ({"kernel": x["kernel"], "bias": x["bias"]} for x in (tree(dtype=dtype), tree(1, dtype)))
    p["kernel"] = p["kernel"][:, :128]
    gradients["kernel"] = gradients["kernel"][:, :128]
    spec = {"kernel": P("data", None) if axis == 0 else P(None, "data"), "bias": P()}
    divide = lambda tree: {name: jax.device_put(x, NamedSharding(mesh, spec[name])) for name, x in tree.items()}

    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        p, gradients = divide(p), divide(gradients)
        state = tx.init(p)
        step = jax.jit(lambda p, state: jadam.step(tx, gradients, state, p))
        for _ in range(3):  # the state comes to be on the mesh
            p, state = step(p, state)
        compiled = step._cache_size()
        for _ in range(3):
            p, state = step(p, state)
        assert step._cache_size() == compiled
        told = [jadam.statistics(tx, state, p), jadam.statistics(tx, state, p, gradients)]
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves((told, state.ring)))
    alone, alone_p, alone_gradients = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (state, p, gradients))
    wanted = [jadam.statistics(tx, alone, alone_p), jadam.statistics(tx, alone, alone_p, alone_gradients)]
    for a, b in zip(jax.tree.leaves(told), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2 * 8216 * 2.0**-24)  # sums in another order
    kept = jadam.history(state)
    np.testing.assert_array_equal(kept.steps, [4, 6])
    for name, x in {"total": told[0].total, **told[0].leaves}.items():
        for field, value in x._asdict().items():
            found = kept.total if name == "total" else kept.leaves[name]
            np.testing.assert_allclose(found[field][-1], value, rtol=4212 * 2.0**-24)  # as in test_record


@pytest.mark.every(3)
@pytest.mark.parametrize("member", FAMILY, ids=str)
def test_the_family(member):
    """Against the oracles, which start from gradients: the implied update is the real one, but for NAdam's."""
    settings = {**member.settings}
    gs = [np.asarray(tree(i)["kernel"], np.float64) for i in range(1, 8)]
    tx = member.make(0.1, **settings, **({"weight_decay": 0.0} if member.decays else {}))
    p = {"w": jnp.ones_like(tree()["kernel"])}
    state, u, update = tx.init(p), None, jax.jit(tx.update)
    for g in gs:
        u, state = update({"w": jnp.asarray(g, jnp.float32)}, state, p)
    directions = member.oracle(gs, **settings)
    told = jadam.statistics(tx, state, p).total
    given = jadam.statistics(tx, state, p, u).total
    b1, b2, eps = settings["b1"], settings["b2"], settings["eps"]
    m = functools.reduce(lambda m, g: b1 * m + (1 - b1) * g, gs, 0)
    v = functools.reduce(lambda v, g: b2 * v + (1 - b2) * g**2, gs, 0)
    t = len(gs)
    v_hats = [functools.reduce(lambda v, g: b2 * v + (1 - b2) * g**2, gs[:k], 0) / (1 - b2**k) for k in range(1, t + 1)]
    root = np.sqrt(v / (1 - b2**t))
    if member.name.startswith("adamax"):
        root = functools.reduce(lambda x, g: np.maximum(b2 * x, np.abs(g) + eps), gs, 0)
    if member.name == "amsgrad":
        root = np.sqrt(np.max(v_hats, 0))
    update = -0.1 * directions[-1]
    if member.name.startswith("nadam"):
        m_hat = m / (1 - b1**t)
        ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * m_hat / (1 - b1**t)
        implied = -0.1 * ahead / (np.sqrt(root**2 + settings["eps_root"]) + eps)
    else:
        implied = update
    largest = max(eps, np.sqrt(settings.get("eps_root", 0)))
    own = largest * (2 if member.name.startswith("adamax") else 1)  # which has eps within
    wanted = expected(m / (1 - b1**t), root, implied, np.ones(1), own)
    # 1e-6 of the direction, the family's bound, is of 1; the smallest quantile's is below 0.01 of that.
    check(told, wanted, implied, p["w"].size)
    check(given, expected(m / (1 - b1**t), root, update, np.ones(1), own), update, p["w"].size)


def test_radam_before_it_trusts():
    """The bare m_hat."""
    tx = jadam.radam(0.1)
    p = jnp.ones(4)
    u, state = tx.update(jnp.array([1.0, -2.0, 3.0, 0.0]), tx.init(p), p)
    np.testing.assert_allclose(jadam.statistics(tx, state, p).total.update_rms, np.sqrt(np.mean(u**2)), rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "exact_bf16", "adamax", "amsgrad", "radam", "scheduled"])
def test_before_the_first_step_all_is_zero(name):
    made = {"int8": lambda: adamw("int8"), "exact_bf16": lambda: jadam.exact_bf16(adamw("bfloat16"))}
    made["scheduled"] = lambda: jadam.adam(1e-3, lambda count: B1)
    tx, p = made.get(name, lambda: getattr(jadam, name)(1e-3))(), tree()
    told = jadam.statistics(tx, tx.init(p), p)
    assert all((x == 0).all() for x in jax.tree.leaves(told))


def test_snr_where_v_is_zero():
    """0, also where m is not: a gradient of 0 with b2=0, or one whose square vanishes."""
    p, g = {"a": jnp.ones(3)}, {"a": jnp.full(3, 1e6)}
    tx = jadam.adam(1e-2, b2=0.0)
    _, state = tx.update(g, tx.init(p), p)
    _, state = tx.update({"a": jnp.array([0.0, 1e-30, 1e6])}, state, p)
    assert (state[0].mu["a"] != 0).all()
    # of the last coordinate alone: m is 0.19e6, its correction 0.19, by a few roundings
    np.testing.assert_allclose(jadam.statistics(tx, state, p).total.snr, 1 / 3, rtol=2.0**-21)


def test_what_int8_rounds_to_zero():
    """A second gradient of -b1 times the first leaves m at 0 but for rounding, in every fourth column."""
    tx = jadam.adam(1e-2, 0.5, 0.999, moments="int8")  # 0.5, so that m is 0
    p = jnp.ones((64, 128))
    g = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], p.shape), jnp.float32)
    _, state = tx.update(g, tx.init(p), p)
    # The first m of a column is coded to all its bits: |r| is the same everywhere, hence the largest of its block.
    _, state = tx.update(jnp.where(jnp.arange(128) % 4 == 0, -0.5 * g, g), state, p)
    told = jadam.statistics(tx, state, p).total
    assert told.zero_share == 0.25


def test_the_corrections_of_scheduled_betas():
    """Betas that differ at every step: the weights sum to one by their products."""
    b1, b2 = (lambda t: 0.9 - 0.5 / (t + 1.0)), (lambda t: 0.99 - 0.3 / (t + 2.0))
    gs = [np.asarray(tree(i)["kernel"], np.float64) for i in range(1, 6)]
    tx = jadam.adam(1.0, b1, b2)
    p = jnp.ones_like(gs[0])
    state = tx.init(p)
    for g in gs:
        _, state = tx.update(jnp.asarray(g, jnp.float32), state, p)
    direction = oracle.adam_scheduled(gs, b1, b2)[-1]
    told = jadam.statistics(tx, state, p).total
    np.testing.assert_allclose(told.update_rms, np.sqrt(np.mean(direction**2)), rtol=p.size * 2.0**-24)


def test_quantiles_of_what_is_in_one_bin_or_not_finite():
    p, tx = jnp.zeros((2, 100)), jadam.adam(1.0)
    _, state = tx.update(p, tx.init(p), p)
    quantiles = lambda u: jadam.statistics(tx, state, p, u).total.step_quantiles
    np.testing.assert_array_equal(quantiles(p), np.zeros(5))
    np.testing.assert_array_equal(quantiles(p - 1e-45), np.zeros(5))
    # 200 numbers in [2, 2.5): by interpolation the q-th part of the bin; one rounding of a rank of 200, times 0.5
    np.testing.assert_allclose(quantiles(p - 2.25), 2 + QUANTILES * 0.5, rtol=2.0**-22)
    assert not np.isfinite(quantiles(p + jnp.inf)).any()
    assert not np.isfinite(jadam.statistics(tx, state, p, p + jnp.nan).total.update_rms)
    assert np.isnan(quantiles(p.at[1, 7].set(jnp.nan))).all()
    np.testing.assert_array_equal(quantiles(p.at[1, :20].set(jnp.inf)), [0, 0, 0, 0, np.inf])
    half = jnp.concatenate([p[:1], p[1:] + 1.0])  # half are 0, half in [1, 1.25)
    assert (quantiles(half)[:3] == 0).all()
    assert (quantiles(half)[3:] > 1).all()


def test_quantiles_are_in_order_and_where_something_is():
    """Whatever roundings the sums of a histogram take: of counts beyond 2**24, of fractions, with gaps between."""
    rng = np.random.default_rng(0)
    histograms = np.zeros((500, 1020))  # the bins of finite numbers
    for row in histograms:
        modes = rng.choice(20, rng.integers(1, 5), replace=False)
        for mode in modes:  # of 5, 20, ... % of all, so that what is told often lies at the end of a mode
            width = rng.integers(1, 40)
            parts = rng.random(width) ** rng.integers(1, 20)
            row[51 * mode : 51 * mode + width] = rng.choice([1, 4, 5, 10]) * parts / parts.sum()
        row *= rng.choice([1e-3, 1e3, 1e9])
    histograms = np.pad(histograms, ((0, 0), (0, 4)))
    told = np.asarray(_quantiles(jnp.asarray(histograms, jnp.float32)))
    assert (np.diff(told) >= 0).all()
    for row, values in zip(histograms, told, strict=True):
        bins = np.flatnonzero(row)
        within = (LOWER[bins] <= values[:, None]) & (values[:, None] <= UPPER[bins])
        assert within.any(1).all() or (not bins.size and not values.any())
        # 1,024 sums, each off by a rounding of all: the true rank is next to the one that is told
        reached = np.cumsum(row) / max(row.sum(), 1e-30)
        for value, q in zip(values[: 5 * (bins.size > 0)], QUANTILES, strict=False):
            first = np.searchsorted(reached, q - 2.0**-14)
            last = min(np.searchsorted(reached, q + 2.0**-14), bins[-1])
            assert LOWER[first] <= value <= UPPER[last]


@pytest.mark.parametrize("k", [-100, -70, 70, 118])
def test_squares_neither_overflow_nor_vanish(k):
    """A power of two before parameters and updates is before their root mean squares, to the bit."""
    tx, p = jadam.adamax(1e-2, eps=0.0), tree()
    _, (state, *rest), _ = trained(tx, p)
    u = jax.tree.map(lambda p: p[..., ::-1] if p.ndim else p, p)
    scaled = lambda tree: jax.tree.map(lambda x: x * 2.0**k, tree)
    told = jadam.statistics(tx, (state, *rest), p, u)
    beyond = state._replace(mu=scaled(state.mu), nu=scaled(state.nu))
    far = jadam.statistics(tx, (beyond, *rest), scaled(p), scaled(u))
    for a, b in zip([far.total, *far.leaves.values()], [told.total, *told.leaves.values()], strict=True):
        for name in ("moment_rms", "update_rms"):
            assert getattr(a, name) == getattr(b, name) * 2.0**k
        np.testing.assert_array_equal(a.step_quantiles, b.step_quantiles * 2.0**k)
        assert (a.update_ratio, a.snr) == (b.update_ratio, b.snr)
    np.testing.assert_allclose(told.total.update_ratio, 1, rtol=8729 * 2.0**-24)  # the same numbers in another order


def test_the_largest_steps():
    """Of the last finite bin, which ends at the largest finite number."""
    tx, p = jadam.adam(1e-2), jnp.full(100, 3.4e38)
    told = jadam.statistics(tx, tx.update(p, tx.init(p), p)[1], p, p).total
    np.testing.assert_allclose([told.update_rms, told.update_ratio], [3.4e38, 1], rtol=100 * 2.0**-24)
    assert ((told.step_quantiles >= 2.97e38) & (told.step_quantiles < jnp.inf)).all()
    assert told.moment_rms == jnp.inf  # as v is


def test_a_sample():
    """Every k-th row, or element of a vector; what differs between rows only in its order is told alike."""
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((1, 128)), jnp.float32)
    p = {"w": jnp.tile(rows, (64, 1)), "b": jnp.ones(1000), "int8": jnp.tile(rows, (512, 1))}
    tx = jadam.adam(1e-2, moments="int8")
    exact = jadam.adam(1e-2)
    state, plain = (jax.jit(x.update)(p, x.init(p), p)[1] for x in (tx, exact))
    some, all_ = (jadam.statistics(exact, plain, p, sample=n) for n in (256, None))
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(all_), strict=True):
        # the total weighs a leaf by all its coordinates; each is a sum of 65,536 + 8,192 + 1,000 terms at most
        np.testing.assert_allclose(a, b, rtol=74728 * 2.0**-24)
    program = jax.make_jaxpr(lambda s, p: jadam.statistics(tx, s, p, sample=256))(state, p)
    program = program.eqns[0]  # the jitted function; behind it the rows of its results
    (adds,) = [e for e in program.params["jaxpr"].eqns if e.primitive.name == "scatter-add"]
    assert adds.outvars[0].aval.shape == (3 * 1024,)
    assert adds.invars[1].aval.shape[:-1] == (3, 256)  # of two rows of two matrices, and of 250 with some filled in


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ((12, 64, 1024), (12, 3, 1024)),  # a few rows of each of the stacked layers
        ((3, 3, 128, 128), (3, 3, 26, 128)),
        ((768, 12, 64), (43, 12, 64)),
        ((20, 2, 2**15), (1, 1, 2**15)),
        ((2, 2**16), (1, 2**16)),
        ((10**6,), (32258,)),
        ((), ()),
        ((5, 0), (5, 0)),
    ],
)
def test_what_a_sample_is_of(shape, wanted):
    """About ``2**15``, fewest of the longest axis; more where a row has more."""
    assert np.empty(shape)[measuring._few(shape, 2**15)].shape == wanted


@pytest.mark.parametrize("most", [pytest.param(1, marks=pytest.mark.slow), 4096])
def test_leaves_by_themselves_and_together(monkeypatch, most):
    """How many are looked at at once changes nothing: the sums of the filled ones may be in another order."""
    p, state, _ = trained(tx := adamw("int8"), tree())
    told = jadam.statistics(tx, state, p)
    monkeypatch.setattr(measuring, "MOST", most)
    _, rows = measuring.in_rows(tx, None, state, p)
    for name, total, *leaves in zip(
        measuring.Measures._fields, *map(list, zip(*map(list, rows), strict=True)), strict=True
    ):
        np.testing.assert_allclose(total, getattr(told.total, name), rtol=8729 * 2.0**-24)
        for x, path in zip(leaves, told.leaves, strict=True):
            np.testing.assert_allclose(x, getattr(told.leaves[path], name), rtol=8729 * 2.0**-24)


def test_one_trace_and_pure():
    tx = adamw("int8")
    p, state, updates = trained(tx, tree())
    told = jax.jit(functools.partial(jadam.statistics, tx))
    told(state, p), told(state, p)
    assert told._cache_size() == 1
    told(state, p, updates)
    text = told.lower(state, p).as_text()
    assert "callback" not in text
    assert "stablehlo.sort" not in text


@pytest.mark.usefixtures("strict")
def test_strict_promotion():
    tx = jadam.nadamw(rate, B1, optax.constant_schedule(B2))
    p, state, _ = trained(tx, tree())
    assert np.isfinite(jadam.statistics(tx, state, p).total.update_rms)


@pytest.mark.usefixtures("x64")
def test_complex_and_float64():
    rng = np.random.default_rng(0)
    p = {
        "z": jnp.asarray(rng.standard_normal(50) + 1j * rng.standard_normal(50)),
        "x": jnp.asarray(rng.standard_normal(9)),
    }
    tx = jadam.adam(RATE)
    u, state = tx.update(p, tx.init(p), p)
    told = jadam.statistics(tx, state, p)
    for name in p:
        wanted = expected(p[name], np.abs(p[name]), u[name], np.asarray(p[name]), 1e-8)
        check(told.leaves[f"['{name}']"], wanted, u[name], p[name].size)
    far = jadam.statistics(tx, state, *({"z": p["z"], "x": 1e-300 * x["x"]} for x in (p, u))).leaves["['x']"]
    np.testing.assert_allclose(far.update_ratio, told.leaves["['x']"].update_ratio, rtol=2.0**-23)
