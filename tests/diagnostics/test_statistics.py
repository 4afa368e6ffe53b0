"""`jadam.statistics` against NumPy in float64, from the state's own arrays."""

import contextlib
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from family import FAMILY
from helpers import FORMATS, MESH, zip_leaves
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jadam
from jadam._diagnostics import statistics as measuring
from jadam._diagnostics.statistics import LOWER, QUANTILES, UPPER, _quantiles

B1, B2, EPS, RATE, DECAY, STEPS = 0.8, 0.95, 0.3, 0.01, 0.1, 5  # an eps that dominates here and there
rate = optax.exponential_decay(RATE, 1, 0.5)  # what a wrong count would get wrong


def tree(seed=0, dtype=np.float32):
    """NumPy arrays, which cost no compilation: a matrix for each format, and what stays float32 in each."""
    rng = np.random.default_rng(seed)
    x = lambda *shape: np.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 2, shape), dtype)
    matrices = {f"{name} kernel": x(64, 136) for name in FORMATS}
    return {**matrices, "bias": x(24), "scale": x(), "none": None, "empty": x(0, 4)}


def one_of_each():
    return {name: tree()[name] for name in ("int8 kernel", "bias", "scale", "empty")}


def kernel(seed):
    """One matrix alone."""
    return {"w": tree(seed)["int8 kernel"]}


@functools.cache
def updating(tx):
    """One step in one program: the new parameters, the state and the updates."""

    @jax.jit
    def step(g, state, p):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state, updates

    return step


@functools.cache
def telling(tx):
    """Statistics of what the moments imply and of given updates, in one program."""
    return jax.jit(lambda state, p, u: (jadam.statistics(tx, state, p), jadam.statistics(tx, state, p, u)))


@functools.cache
def initial(tx):
    return jax.jit(tx.init)


def gradients(i, dtype=np.float32):
    """The first of some columns are their only ones."""
    g = tree(i + 1, dtype)
    for x in jax.tree.leaves(g):
        if x.ndim == 2 and i > 0:
            x[:, ::3] = 0
    return g


def trained(tx, p):
    """After some steps, the last one's updates besides."""
    state, updates = initial(tx)(p), None
    for i in range(STEPS):
        g = gradients(i, p["bias"].dtype)
        p, state, updates = updating(tx)({name: g[name] for name in p}, state, p)
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


def check(told, wanted, u, n, row=""):
    """Scalars and quantiles of ``u``.

    A sum of n float32 terms >= 0, in whatever order, is off by at most n * 2**-24 of itself, each term by 16 roundings;
    roots halve that. A comparison with eps may fall otherwise for a coordinate within 16 roundings of it: at most one
    here. The quantile lies in the bin of the coordinate that has it, [1, 1.25) of something at the widest; so does
    what is told. 8 roundings may put that coordinate into the next bin, at its edge.
    """
    for name, x in wanted.items():
        share = 1 / max(1, u.size) if name.endswith("share") else 0
        np.testing.assert_allclose(
            getattr(told, name), x, rtol=(n + 16) * 2.0**-24, atol=share, err_msg=f"{row} {name}"
        )
    if u.size:
        true = np.quantile(np.abs(u), QUANTILES, method="inverted_cdf")
        found = np.asarray(told.step_quantiles)
        assert ((found >= true / 1.2500012) & (found <= true * 1.2500012)).all(), (row, found, true)


def adam(state, name, p, decay=DECAY, decays=True):
    """An Adam's numbers for one leaf at ``STEPS``."""
    m, v = moments(state, name)
    m_hat, v_hat = m / (1 - B1**STEPS), v / (1 - B2**STEPS)
    u = -RATE * 0.5 ** (STEPS - 1) * (m_hat / (np.sqrt(v_hat) + EPS) + decay * decays * p)
    int8 = state.mu[name].dtype == jnp.int8
    zero = np.mean((np.asarray(state.mu[name]) == 0) & (np.asarray(state.nu[name]) != 0)) if int8 else 0.0
    return m_hat, np.sqrt(v_hat), u, zero


def check_all(told, state, p, names, masked=()):
    """Of each leaf, and of the total: a sum of the leaves' sums has the roundings of the largest, and one a leaf."""
    rows = []
    for name in names:
        wide = np.asarray(p[name], np.float64)
        m_hat, root, u, zero = adam(state, name, wide, decays=name not in masked)
        check(told.leaves[f"['{name}']"], expected(m_hat, root, u, wide, EPS, zero), u, wide.size, name)
        rows.append([np.ravel(x) for x in (m_hat, root, u, wide)] + [np.full(wide.size, zero)])
    assert set(told.leaves) == {f"['{name}']" for name in names}
    n = max(len(row[0]) for row in rows) + len(rows)
    m_hat, root, u, wide, zero = (np.concatenate(x) for x in zip(*rows, strict=True))
    check(told.total, expected(m_hat, root, u, wide, EPS, zero.mean()), u, n, "total")


NAMES = [*(f"{name} kernel" for name in FORMATS), "bias", "scale", "empty"]
MASKED = ["float32 kernel", "bias"]


def by_name(path, p):
    return next((name for name in FORMATS if name in path), "int8")  # small leaves stay float32


def adamw(moments=by_name, b1=B1, **kwargs):
    return jadam.adamw(rate, b1, B2, EPS, weight_decay=DECAY, moments=moments, **kwargs)


def chained(tx):
    return jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(2.0), tx)


FORMATTED = chained(adamw(mask=lambda p: {name: name not in MASKED for name in p}))
SCHEDULES = {"b1": lambda t: 0.9 - 0.5 / (t + 1.0), "b2": lambda t: 0.99 - 0.3 / (t + 2.0)}
SCHEDULED = jadam.adam(1.0, **SCHEDULES)
EXACT_BF16 = {
    moments: jadam.exact_bf16(jadam.chain(jadam.clip(1.0), adamw(moments))) for moments in ("bfloat16", "int8")
}
HOW = {  # how to make it, and whose weights do not decay
    "chain, some masked": (lambda: FORMATTED, MASKED),
    "all masked": (lambda: adamw(mask=lambda p: jax.tree.map(lambda x: False, p)), NAMES),
    "alone": (adamw, ()),
    "scheduled betas": (lambda: adamw(b1=optax.constant_schedule(B1)), ()),
    "record": (lambda: jadam.record(adamw(), every=2, keep=2), ()),
}


@helpers.parametrize("how", HOW, default=["chain, some masked"])
def test_every_format(how):
    make, masked = how
    tx = make()
    p, state, _ = trained(tx, tree())
    told = jadam.statistics(tx, state, p)
    is_adam = lambda x: hasattr(x, "mu")
    own = next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    assert [own.mu[name].dtype for name in NAMES] == [*map(jnp.dtype, FORMATS), *[jnp.float32] * 3]
    check_all(told, own, p, NAMES, masked)
    assert told.total.eps_share > 0.1
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(told))


@helpers.parametrize("tx", EXACT_BF16, default=[])
def test_exact_bf16(tx):
    """The masters' numbers."""
    p, state, _ = trained(tx, tree(dtype=jnp.bfloat16))
    told = jadam.statistics(tx, state, p)
    check_all(told, state.inner_state[1][0], jadam.float32_params(p, state), NAMES)


def test_by_path_leaves_frozen_ones_out():
    rules = [("bias", jadam.FROZEN), ("scale", {"b1": optax.constant_schedule(B1), "moments": "float32"}), ("", {})]
    tx = jadam.by_path(rules, rate, B1, B2, EPS, weight_decay=DECAY, moments="int8")
    p, state, _ = trained(tx, one_of_each())
    told = jadam.statistics(tx, state, p)
    check_all(told, state.moments, p, ["int8 kernel", "scale", "empty"])


@pytest.mark.slow
def test_zero1():
    """Divided over eight devices, the numbers of one: sums in another order."""
    p = jax.tree.map(jnp.asarray, tree())
    tx = jadam.sharding.zero1(FORMATTED, p, MESH, "data")
    state, update = tx.init(p), jax.jit(tx.update)
    for i in range(STEPS):
        updates, state = update(gradients(i), state, p)
        p = optax.apply_updates(p, updates)
    told = jadam.statistics(tx, state, p)
    alone = jadam.statistics(FORMATTED, *jax.tree.map(np.asarray, (state, p)))
    for a, b in zip_leaves(told, alone):
        np.testing.assert_allclose(a, b, rtol=2 * 8729 * 2.0**-24)


EXPLICIT = {
    "float32": lambda: adamw("float32"),
    "int8": lambda: adamw("int8"),
    "chain": lambda: jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(2.0), adamw("int8"))),
    "amsgrad": lambda: jadam.amsgrad(1e-2, moments="bfloat16"),
    "by_path": lambda: jadam.by_path([("bias", jadam.FROZEN), ("", {"b1": lambda count: B1})], 1e-2),
}


@helpers.parametrize_grid({"make": EXPLICIT, "context": {"in set_mesh": True, "bare": False}}, default=["int8-bare"])
def test_explicit_axes(make, context):
    """Where JAX infers no sharding: the numbers of one device, also of what record keeps, and one compilation."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    tx = jadam.record(make(), every=2, keep=2, sample=None)
    spec = {"rows": P("data", None), "columns": P(None, "data"), "bias": P()}

    def divided(seed):
        x = tree(seed, jnp.bfloat16 if make is EXPLICIT["chain"] else jnp.float32)
        x = {"rows": x["float32 kernel"][:, :128], "columns": x["int8 kernel"][:, :128], "bias": x["bias"]}
        return {name: jax.device_put(x, NamedSharding(mesh, spec[name])) for name, x in x.items()}

    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        p, gradients = divided(0), divided(1)
        state = tx.init(p)
        step = jax.jit(lambda p, state: jadam.step(tx, gradients, state, p))
        for _ in range(3):  # the state comes to be on the mesh
            p, state = step(p, state)
        compiled = step._cache_size()
        for _ in range(3):
            p, state = step(p, state)
        assert step._cache_size() == compiled
        told = telling(tx)(state, p, gradients)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves((told, state.ring)))
    wanted = telling(tx)(*jax.tree.map(np.asarray, (state, p, gradients)))
    for a, b in zip_leaves(told, wanted):
        np.testing.assert_allclose(a, b, rtol=2 * 8216 * 2.0**-24)  # each leaf's sum in another order
    kept = jadam.history(state)
    np.testing.assert_array_equal(kept.steps, [4, 6])
    for name, x in {"total": told[0].total, **told[0].leaves}.items():
        for field, value in x._asdict().items():
            found = kept.total if name == "total" else kept.leaves[name]
            np.testing.assert_allclose(found[field][-1], value, rtol=4140 * 2.0**-24)  # as in test_record


MEMBERS = {
    member.name: member.make(0.1, **member.settings, **({"weight_decay": 0.0} if member.decays else {}))
    for member in FAMILY
}


@helpers.parametrize("member", helpers.MEMBERS, default=["adamax", "nadamw", "amsgrad", "radam"])
def test_the_family(member):
    """Against the oracles, which start from gradients: the implied update is the real one, but for NAdam's."""
    settings = {**member.settings}
    small = np.where(np.arange(136) < 4, 2.0**-12, 1)  # where eps decides
    gs = [small * kernel(i)["w"].astype(np.float64) for i in range(1, 8)]
    tx = MEMBERS[member.name]
    p = {"w": np.ones_like(kernel(0)["w"])}
    state = initial(tx)(p)
    for g in gs:
        _, state, u = updating(tx)({"w": g.astype(np.float32)}, state, p)
    directions = member.oracle(gs, **settings)
    told, given = (x.total for x in telling(tx)(state, p, u))
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
    check(told, wanted, implied, p["w"].size, "implied")
    check(given, expected(m / (1 - b1**t), root, update, np.ones(1), own), update, p["w"].size, "given")


def test_radam_before_it_trusts():
    """The bare m_hat."""
    tx, p = MEMBERS["radam"], {"w": np.ones_like(kernel(0)["w"])}
    g = {"w": np.zeros_like(p["w"])}  # most are 0 and add no rounding
    g["w"][0, :4] = [1, -2, 3, 0]
    _, state, u = updating(tx)(g, initial(tx)(p), p)
    np.testing.assert_allclose(u["w"][0, :4], [-0.1, 0.2, -0.3, 0], rtol=1e-6)
    wanted = np.sqrt(np.mean(np.asarray(u["w"], np.float64) ** 2))
    for told in telling(tx)(state, p, u):
        np.testing.assert_allclose(told.total.update_rms, wanted, rtol=1e-6)


# A transformation and parameters: the program is that of the test which trains it.
UNTRAINED = {
    "every format": (FORMATTED, tree),
    "exact_bf16": (EXACT_BF16["bfloat16"], lambda: tree(dtype=jnp.bfloat16)),
    "scheduled": (SCHEDULED, lambda: kernel(0)),
    **{name: (MEMBERS[name], lambda: kernel(0)) for name in ("adamax", "amsgrad", "radam")},
}


@helpers.parametrize("untrained", UNTRAINED, default=UNTRAINED.keys() - {"exact_bf16"})
def test_before_the_first_step_all_is_zero(untrained):
    """Also of given updates."""
    tx, make = untrained
    state, p = initial(tx)(make()), make()
    told = telling(tx)(state, p, p) if set(p) == {"w"} else jadam.statistics(tx, state, p)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(told))


def test_snr_where_v_is_zero():
    """0, also where m is not: a gradient of 0 with b2=0, or one whose square vanishes."""
    p, g = {"a": np.ones(3, np.float32)}, {"a": np.full(3, 1e6, np.float32)}
    tx = jadam.adam(1e-2, b2=0.0)
    _, state, _ = updating(tx)(g, initial(tx)(p), p)
    _, state, _ = updating(tx)({"a": np.array([0.0, 1e-30, 1e6], np.float32)}, state, p)
    assert (np.asarray(state[0].mu["a"]) != 0).all()
    # of the last coordinate alone: m is 0.19e6, its correction 0.19, by a few roundings
    np.testing.assert_allclose(jadam.statistics(tx, state, p).total.snr, 1 / 3, rtol=2.0**-21)


def test_what_int8_rounds_to_zero():
    """A second gradient of -b1 times the first leaves m at 0 but for rounding, in every fourth column."""
    tx = jadam.adam(1e-2, 0.5, 0.999, moments="int8")  # 0.5, so that m is 0
    p = np.ones((64, 128), np.float32)
    g = np.random.default_rng(0).choice([-1.0, 1.0], p.shape).astype(np.float32)
    _, state, _ = updating(tx)(g, initial(tx)(p), p)
    # The first m of a column is coded to all its bits: |r| is the same everywhere, hence the largest of its block.
    _, state, _ = updating(tx)(np.where(np.arange(128) % 4 == 0, -g / 2, g), state, p)
    told = jadam.statistics(tx, state, p).total
    assert told.zero_share == 0.25


def test_the_corrections_of_scheduled_betas():
    """Betas that differ at every step: the weights sum to one by their products."""
    gs = [kernel(i)["w"].astype(np.float64) for i in range(1, 6)]
    p = {"w": np.ones_like(kernel(0)["w"])}
    state = initial(SCHEDULED)(p)
    for g in gs:
        _, state, u = updating(SCHEDULED)({"w": g.astype(np.float32)}, state, p)
    direction = oracle.adam_scheduled(gs, **SCHEDULES)[-1]
    for told in telling(SCHEDULED)(state, p, u):
        wanted = np.sqrt(np.mean(direction**2))
        np.testing.assert_allclose(told.total.update_rms, wanted, rtol=p["w"].size * 2.0**-24)


ADAM = jadam.adam(1.0)


def test_quantiles_of_what_is_in_one_bin_or_not_finite():
    p = np.zeros((2, 50), np.float32)
    _, state, _ = updating(ADAM)(p, initial(ADAM)(p), p)
    told = lambda u: jadam.statistics(ADAM, state, p, u.astype(np.float32)).total
    quantiles = lambda u: np.asarray(told(u).step_quantiles)
    np.testing.assert_array_equal(quantiles(p), np.zeros(5))
    np.testing.assert_array_equal(quantiles(p - np.float32(1e-45)), np.zeros(5))
    # 100 numbers in [2, 2.5): by interpolation the q-th part of the bin; one rounding of a rank of 100, times 0.5
    np.testing.assert_allclose(quantiles(p - 2.25), 2 + QUANTILES * 0.5, rtol=2.0**-22)
    assert not np.isfinite(quantiles(p + np.inf)).any()
    assert not np.isfinite(told(p + np.nan).update_rms)
    some = lambda x, index: np.where(np.arange(100).reshape(p.shape) >= index, np.float32(x), p)
    assert np.isnan(quantiles(some(np.nan, 99))).all()
    np.testing.assert_array_equal(quantiles(some(np.inf, 90)), [0, 0, 0, 0, np.inf])
    half = some(1.0, 50)  # half are 0, half in [1, 1.25)
    assert (quantiles(half)[:3] == 0).all()
    assert (quantiles(half)[3:] > 1).all()


def test_the_largest_steps():
    """Of the last finite bin, which ends at the largest finite number."""
    p = np.full((2, 50), 3.4e38, np.float32)
    told = jadam.statistics(ADAM, updating(ADAM)(p, initial(ADAM)(p), p)[1], p, p).total
    np.testing.assert_allclose([told.update_rms, told.update_ratio], [3.4e38, 1], rtol=100 * 2.0**-24)
    assert ((told.step_quantiles >= 2.97e38) & (told.step_quantiles < np.inf)).all()
    assert told.moment_rms == np.inf  # as v is


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
    told = np.asarray(jax.jit(_quantiles)(histograms.astype(np.float32)))
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


def test_squares_neither_overflow_nor_vanish():
    """A power of two before parameters and updates is before their root mean squares, to the bit."""
    tx, p = jadam.adamax(1e-2, eps=0.0), one_of_each()
    p, state, _ = jax.tree.map(np.asarray, trained(tx, p))
    u = jax.tree.map(lambda p: p[..., ::-1] if p.ndim else p, p)
    told = jax.tree.map(np.asarray, jadam.statistics(tx, state, p, u))
    for k in (-100, -70, 70, 118):
        scaled = lambda tree, k=k: jax.tree.map(lambda x: x * np.float32(2.0**k), tree)
        beyond = state[0]._replace(mu=scaled(state[0].mu), nu=scaled(state[0].nu))
        far = jadam.statistics(tx, (beyond, *state[1:]), scaled(p), scaled(u))
        for name, b in {"total": told.total, **told.leaves}.items():
            a = far.total if name == "total" else far.leaves[name]
            for field in ("moment_rms", "update_rms"):
                assert getattr(a, field) == getattr(b, field) * 2.0**k, (k, name, field)
            np.testing.assert_array_equal(a.step_quantiles, b.step_quantiles * 2.0**k, err_msg=f"{k} {name}")
            assert (a.update_ratio, a.snr) == (b.update_ratio, b.snr), (k, name)
        assert set(far.leaves) == set(told.leaves)
    np.testing.assert_allclose(told.total.update_ratio, 1, rtol=8729 * 2.0**-24)  # the same numbers in another order


def test_a_sample():
    """Every k-th row, or element of a vector; what differs between rows only in its order is told alike."""
    rows = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
    p = {"w": np.tile(rows, (64, 1)), "b": np.ones(1000, np.float32), "int8": np.tile(rows, (512, 1))}
    tx = jadam.adam(1e-2, moments="int8")
    _, plain, _ = updating(ADAM)(p, initial(ADAM)(p), p)
    both = jax.jit(lambda state, p: [jadam.statistics(ADAM, state, p, sample=n) for n in (256, None)])
    some, all_ = both(plain, p)
    for a, b in zip_leaves(some, all_):
        # the total weighs a leaf by all its coordinates; each is a sum of 65,536 + 8,192 + 1,000 terms at most
        np.testing.assert_allclose(a, b, rtol=74728 * 2.0**-24)
    state = jax.eval_shape(tx.init, p)
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
    assert np.empty(shape)[measuring._subsample(shape, 2**15)].shape == wanted


@helpers.parametrize("most", [1, 4096], default=["4096"])
def test_leaves_by_themselves_and_together(monkeypatch, most):
    """How many are looked at at once changes nothing: the sums of the filled ones may be in another order."""
    p, state, _ = trained(FORMATTED, tree())
    told = jadam.statistics(FORMATTED, state, p)
    monkeypatch.setattr(measuring, "MAX_BATCH", most)
    rows = jax.jit(lambda state, p: measuring.measure(FORMATTED, None, state, p)[1])(state, p)
    for name, total, *each in zip(
        measuring.Measures._fields, *map(list, zip(*map(np.asarray, rows), strict=True)), strict=True
    ):
        np.testing.assert_allclose(total, getattr(told.total, name), rtol=8729 * 2.0**-24, err_msg=name)
        for x, path in zip(each, told.leaves, strict=True):
            wanted = getattr(told.leaves[path], name)
            np.testing.assert_allclose(x, wanted, rtol=8729 * 2.0**-24, err_msg=f"{name} {path}")


def test_one_trace_and_pure():
    p = np.ones(3, np.float32)
    state = initial(ADAM)(p)
    told = jax.jit(functools.partial(jadam.statistics, ADAM))
    told(state, p), told(state, p)
    assert told._cache_size() == 1
    p = tree()
    told = jax.jit(functools.partial(jadam.statistics, FORMATTED))
    for updates in (None, p):
        text = told.lower(jax.eval_shape(FORMATTED.init, p), p, updates).as_text()
        assert "callback" not in text
        assert "stablehlo.sort" not in text


@pytest.mark.usefixtures("strict")
def test_strict_promotion():
    tx = jadam.nadamw(rate, B1, optax.constant_schedule(B2))
    p, state, _ = trained(tx, one_of_each())
    assert np.isfinite(jadam.statistics(tx, state, p).total.update_rms)


@pytest.mark.usefixtures("x64")
def test_complex_and_float64():
    rng = np.random.default_rng(0)
    p = {"z": rng.standard_normal(50) + 1j * rng.standard_normal(50), "x": rng.standard_normal(9)}
    tx = jadam.adam(RATE)
    u, state = jax.jit(tx.update)(p, initial(tx)(p), p)
    small = lambda tree: {"z": tree["z"], "x": 1e-300 * np.asarray(tree["x"])}
    told, far = jax.jit(lambda state, p, *far: (jadam.statistics(tx, state, p), jadam.statistics(tx, state, *far)))(
        state, p, small(p), small(u)
    )
    for name in p:
        wanted = expected(p[name], np.abs(p[name]), np.asarray(u[name]), p[name], 1e-8)
        check(told.leaves[f"['{name}']"], wanted, np.asarray(u[name]), p[name].size, name)
    ratio, wanted = (x.leaves["['x']"].update_ratio for x in (far, told))
    np.testing.assert_allclose(ratio, wanted, rtol=2.0**-23)
