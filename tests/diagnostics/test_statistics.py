"""`jadam.statistics` against NumPy float64, computed from the arrays of the same state."""

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

B1, B2, EPS, RATE, DECAY, STEPS = 0.8, 0.95, 0.3, 0.01, 0.1, 5  # eps is larger than sqrt(v_hat) in some coordinates
rate = optax.exponential_decay(RATE, 1, 0.5)  # detects a wrong count


def tree(seed=0, dtype=np.float32):
    """NumPy arrays (no compilation): a matrix for each format, and leaves that stay float32 in every format."""
    rng = np.random.default_rng(seed)
    x = lambda *shape: np.asarray(rng.standard_normal(shape) * 2.0 ** rng.integers(-8, 2, shape), dtype)
    matrices = {f"{name} kernel": x(64, 136) for name in FORMATS}
    return {**matrices, "bias": x(24), "scale": x(), "none": None, "empty": x(0, 4)}


def small_tree():
    return {name: tree()[name] for name in ("int8 kernel", "bias", "scale", "empty")}


def kernel(seed):
    """A single matrix."""
    return {"w": tree(seed)["int8 kernel"]}


@functools.cache
def jitted_step(tx):
    """Jitted step that returns parameters, state and updates."""

    @jax.jit
    def step(g, state, p):
        updates, state = tx.update(g, state, p)
        return optax.apply_updates(p, updates), state, updates

    return step


@functools.cache
def jitted_statistics(tx):
    """Jitted `jadam.statistics`, without and with ``updates``."""
    return jax.jit(lambda state, p, u: (jadam.statistics(tx, state, p), jadam.statistics(tx, state, p, u)))


@functools.cache
def jitted_init(tx):
    return jax.jit(tx.init)


def gradients(i, dtype=np.float32):
    """Gradients of step ``i``. Every third column is zero after the first step."""
    g = tree(i + 1, dtype)
    for x in jax.tree.leaves(g):
        if x.ndim == 2 and i > 0:
            x[:, ::3] = 0
    return g


def trained(tx, p):
    """Parameters, state and updates after ``STEPS`` steps."""
    state, updates = jitted_init(tx)(p), None
    for i in range(STEPS):
        g = gradients(i, p["bias"].dtype)
        p, state, updates = jitted_step(tx)({name: g[name] for name in p}, state, p)
    return p, state, updates


def moments(state, name):
    """A leaf's ``m, v`` in float64."""
    m, v = (np.asarray(getattr(state, field)[name], np.float64) for field in ("mu", "nu"))
    if state.mu[name].dtype != jnp.int8:
        return m, v
    scales = (np.asarray(getattr(state, field)[name], np.float64) for field in ("mu_scale", "nu_scale"))
    r_scale, v_scale = (np.repeat(x, 128, -1)[..., : m.shape[-1]] for x in scales)
    rq, vq = np.asarray(state.mu[name]), np.asarray(state.nu[name])
    r = ((rq.astype(np.uint32) & 0x7F) << 17 | 0x40000000).view(np.float32) - np.float64(2)
    v = ((vq.astype(np.float32).view(np.uint32) << 3) + np.uint32(0x23800000)).view(np.float32) * np.float64(32 / 31)
    return np.where(rq < 0, -r, r) / 5.9375 * r_scale * np.sqrt(v_scale * v), v_scale * v


def expected(m_hat, root, u, p, eps, zero=0.0):
    """Reference values of the measures."""
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


def check(stats, wanted, u, n, row=""):
    """Compares measures and quantiles of the update ``u`` of ``n`` coordinates.

    A float32 sum of n terms >= 0, in any order, has a relative error of at most n * 2**-24; terms have 16 roundings
    each; a root halves both. A coordinate within 16 roundings of eps may be counted on its other side: here at most
    one. A reported quantile is in the histogram bin of the true one or, after 8 roundings at its edge, in the next. The
    widest bins are [1, 1.25) times a power of two.
    """
    for name, x in wanted.items():
        share = 1 / max(1, u.size) if name.endswith("share") else 0
        np.testing.assert_allclose(
            getattr(stats, name), x, rtol=(n + 16) * 2.0**-24, atol=share, err_msg=f"{row} {name}"
        )
    if u.size:
        true = np.quantile(np.abs(u), QUANTILES, method="inverted_cdf")
        found = np.asarray(stats.step_quantiles)
        assert ((found >= true / 1.2500012) & (found <= true * 1.2500012)).all(), (row, found, true)


def reference(state, name, p, decay=DECAY, decays=True):
    """``m_hat``, ``sqrt(v_hat)``, the update, and the share of int8 codes that are 0, of one leaf after ``STEPS``."""
    m, v = moments(state, name)
    m_hat, v_hat = m / (1 - B1**STEPS), v / (1 - B2**STEPS)
    lr, direction = RATE * 0.5 ** (STEPS - 1), m_hat / (np.sqrt(v_hat) + EPS)
    before = (p + lr * direction) / (1 - lr * decay * decays)  # p is the parameter after the step
    u = -lr * (direction + decay * decays * before)
    int8 = state.mu[name].dtype == jnp.int8
    zero = np.mean((m == 0) & (np.asarray(state.nu[name]) > 1)) if int8 else 0.0
    return m_hat, np.sqrt(v_hat), u, zero


def check_all(stats, state, p, names, masked=()):
    """Checks every leaf and the total, whose sums add one rounding a leaf to those of the largest leaf."""
    rows = []
    for name in names:
        wide = np.asarray(p[name], np.float64)
        m_hat, root, u, zero = reference(state, name, wide, decays=name not in masked)
        check(stats.leaves[f"['{name}']"], expected(m_hat, root, u, wide, EPS, zero), u, wide.size, name)
        rows.append([np.ravel(x) for x in (m_hat, root, u, wide)] + [np.full(wide.size, zero)])
    assert set(stats.leaves) == {f"['{name}']" for name in names}
    n = max(len(row[0]) for row in rows) + len(rows)
    m_hat, root, u, wide, zero = (np.concatenate(x) for x in zip(*rows, strict=True))
    check(stats.total, expected(m_hat, root, u, wide, EPS, zero.mean()), u, n, "total")


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
OPTIMIZERS = {  # {id: (function that makes the optimizer, leaves without weight decay)}
    "chain, some masked": (lambda: FORMATTED, MASKED),
    "all masked": (lambda: adamw(mask=lambda p: jax.tree.map(lambda x: False, p)), NAMES),
    "alone": (adamw, ()),
    "scheduled betas": (lambda: adamw(b1=optax.constant_schedule(B1)), ()),
    "record": (lambda: jadam.record(adamw(), every=2, keep=2), ()),
}


@helpers.parametrize("how", OPTIMIZERS, default=["chain, some masked"])
def test_every_format(how):
    make, masked = how
    tx = make()
    p, state, _ = trained(tx, tree())
    stats = jadam.statistics(tx, state, p)
    is_adam = lambda x: hasattr(x, "mu")
    own = next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))
    assert [own.mu[name].dtype for name in NAMES] == [*map(jnp.dtype, FORMATS), *[jnp.float32] * 3]
    check_all(stats, own, p, NAMES, masked)
    assert stats.total.eps_share > 0.1
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(stats))


@helpers.parametrize("tx", EXACT_BF16, default=[])
def test_exact_bf16(tx):
    """Statistics of the float32 masters."""
    p, state, _ = trained(tx, tree(dtype=jnp.bfloat16))
    stats = jadam.statistics(tx, state, p)
    check_all(stats, state.inner_state[1][0], jadam.float32_params(p, state), NAMES)


def test_by_path_leaves_frozen_ones_out():
    rules = [("bias", jadam.FROZEN), ("scale", {"b1": optax.constant_schedule(B1), "moments": "float32"}), ("", {})]
    tx = jadam.by_path(rules, rate, B1, B2, EPS, weight_decay=DECAY, moments="int8")
    p, state, _ = trained(tx, small_tree())
    stats = jadam.statistics(tx, state, p)
    check_all(stats, state.moments, p, ["int8 kernel", "scale", "empty"])


@pytest.mark.slow
def test_zero1():
    """Eight devices report the statistics of one; only the order of the sums differs."""
    p = jax.tree.map(jnp.asarray, tree())
    tx = jadam.sharding.zero1(FORMATTED, p, MESH, "data")
    state, update = tx.init(p), jax.jit(tx.update)
    for i in range(STEPS):
        updates, state = update(gradients(i), state, p)
        p = optax.apply_updates(p, updates)
    stats = jadam.statistics(tx, state, p)
    alone = jadam.statistics(FORMATTED, *jax.tree.map(np.asarray, (state, p)))
    for a, b in zip_leaves(stats, alone):
        # sums of up to 8,729 terms that are not negative: each rounds as often, by half an ulp
        np.testing.assert_allclose(a, b, rtol=2 * 8729 * 2.0**-24)


EXPLICIT = {
    "float32": lambda: adamw("float32"),
    "int8": lambda: adamw("int8"),
    "chain": lambda: jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(2.0), adamw("int8"))),
    "amsgrad": lambda: jadam.amsgrad(1e-2, moments="bfloat16"),
    "by_path": lambda: jadam.by_path([("bias", jadam.FROZEN), ("", {"b1": lambda count: B1})], 1e-2),
}


@helpers.parametrize_grid(
    {"make": EXPLICIT, "context": {"in set_mesh": True, "bare": False}},
    default=["int8-bare"],
    slow=["chain-in set_mesh"],
)
def test_explicit_axes(make, context):
    """Explicit mesh axes: the statistics and records of one device, and no further compilation."""
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
        for _ in range(3):  # the state moves to the mesh
            p, state = step(p, state)
        compiled = step._cache_size()
        for _ in range(3):
            p, state = step(p, state)
        assert step._cache_size() == compiled
        stats = jitted_statistics(tx)(state, p, gradients)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves((stats, state.ring)))
    wanted = jitted_statistics(tx)(*jax.tree.map(np.asarray, (state, p, gradients)))
    for a, b in zip_leaves(stats, wanted):
        np.testing.assert_allclose(a, b, rtol=2 * 8216 * 2.0**-24)  # each leaf's sum in another order
    kept = jadam.history(state)
    np.testing.assert_array_equal(kept.steps, [4, 6])
    for name, x in {"total": stats[0].total, **stats[0].leaves}.items():
        for field, value in x._asdict().items():
            found = kept.total if name == "total" else kept.leaves[name]
            np.testing.assert_allclose(found[field][-1], value, rtol=4140 * 2.0**-24)  # as in test_record


MEMBERS = {
    member.name: member.make(0.1, **member.settings, **({"weight_decay": 0.0} if member.decays else {}))
    for member in FAMILY
}


@helpers.parametrize("member", helpers.MEMBERS, default=["adamax", "nadamw", "amsgrad", "radam"])
def test_the_family(member):
    """Against the oracles. The update implied by the moments is the real one, except for NAdam."""
    settings = {**member.settings}
    small = np.where(np.arange(136) < 4, 2.0**-12, 1)  # here eps dominates
    gs = [small * kernel(i)["w"].astype(np.float64) for i in range(1, 8)]
    tx = MEMBERS[member.name]
    p = {"w": np.ones_like(kernel(0)["w"])}
    state = jitted_init(tx)(p)
    for g in gs:
        (leaf_update,), _ = tx.update.leafwise({"w": g.astype(np.float32)}, state, p)
        _, state, u = jitted_step(tx)({"w": g.astype(np.float32)}, state, p)
    directions = member.oracle(gs, **settings)
    stats, given = (x.total for x in jitted_statistics(tx)(state, p, u))
    b1, b2, eps = settings["b1"], settings["b2"], settings["eps"]
    m = functools.reduce(lambda m, g: b1 * m + (1 - b1) * g, gs, 0)
    t = len(gs)
    v_hats = [functools.reduce(lambda v, g: b2 * v + (1 - b2) * g**2, gs[:k], 0) / (1 - b2**k) for k in range(1, t + 1)]
    root = np.sqrt(v_hats[-1])
    rule = leaf_update.rule
    if rule.state_type not in (optax.ScaleByAdamState, optax.ScaleByAmsgradState):  # a later relative: its own root
        root = np.asarray(
            rule.denominator(leaf_update.hyperparams, *(optax.tree.get(state, x)["w"] for x in rule.moment_names[1:]))
        )
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
    own = largest * (2 if member.name.startswith("adamax") else 1)  # AdaMax's u contains eps
    wanted = expected(m / (1 - b1**t), root, implied, np.ones(1), own)
    # Directions are of size 1, with errors of 1e-6; those of the smallest quantile are below 0.01 of that.
    check(stats, wanted, implied, p["w"].size, "implied")
    check(given, expected(m / (1 - b1**t), root, update, np.ones(1), own), update, p["w"].size, "given")


def test_radam_before_rectification():
    """Before rectification the update is -lr * m_hat."""
    tx, p = MEMBERS["radam"], {"w": np.ones_like(kernel(0)["w"])}
    g = {"w": np.zeros_like(p["w"])}  # zeros add no rounding to the sum
    g["w"][0, :4] = [1, -2, 3, 0]
    _, state, u = jitted_step(tx)(g, jitted_init(tx)(p), p)
    np.testing.assert_allclose(u["w"][0, :4], [-0.1, 0.2, -0.3, 0], rtol=1e-6)
    wanted = np.sqrt(np.mean(np.asarray(u["w"], np.float64) ** 2))
    for stats in jitted_statistics(tx)(state, p, u):
        np.testing.assert_allclose(stats.total.update_rms, wanted, rtol=1e-6)


# {id: (optimizer, function that makes parameters)}; other tests compile the same programs.
UNTRAINED = {
    "every format": (FORMATTED, tree),
    "exact_bf16": (EXACT_BF16["bfloat16"], lambda: tree(dtype=jnp.bfloat16)),
    "scheduled": (SCHEDULED, lambda: kernel(0)),
    **{name: (MEMBERS[name], lambda: kernel(0)) for name in ("adamax", "amsgrad", "radam")},
}


@helpers.parametrize("untrained", UNTRAINED, default=UNTRAINED.keys() - {"exact_bf16"})
def test_before_the_first_step_all_measures_are_zero(untrained):
    """Before the first step all measures are 0, also with ``updates``."""
    tx, make = untrained
    state, p = jitted_init(tx)(make()), make()
    stats = jitted_statistics(tx)(state, p, p) if set(p) == {"w"} else jadam.statistics(tx, state, p)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(stats))


def test_snr_where_v_is_zero():
    """The snr of a coordinate with v = 0 is 0 even if m is not: after a gradient of 0 with b2=0, or 1e-30 squared."""
    p, g = {"a": np.ones(3, np.float32)}, {"a": np.full(3, 1e6, np.float32)}
    tx = jadam.adam(1e-2, b2=0.0)
    _, state, _ = jitted_step(tx)(g, jitted_init(tx)(p), p)
    _, state, _ = jitted_step(tx)({"a": np.array([0.0, 1e-30, 1e6], np.float32)}, state, p)
    assert (np.asarray(state[0].mu["a"]) != 0).all()
    # only the last coordinate counts: m = 0.19e6, corrected by 0.19; a few roundings
    np.testing.assert_allclose(jadam.statistics(tx, state, p).total.snr, 1 / 3, rtol=2.0**-21)


def test_zero_share_of_int8():
    """In every fourth column the second gradient, -b1 times the first, cancels m, which int8 rounds to 0."""
    tx = jadam.adam(1e-2, 0.5, 0.999, moments="int8")  # b1 = 0.5 makes m exactly 0
    p = np.ones((64, 128), np.float32)
    g = np.random.default_rng(0).choice([-1.0, 1.0], p.shape).astype(np.float32)
    _, state, _ = jitted_step(tx)(g, jitted_init(tx)(p), p)
    # The first m is exact: |r| is the same everywhere, the maximum of its block, which has code 127. It gets 126 with
    # probability 2.4e-5, that of 0.2 of these elements, because `BELOW_R_TOP` is smaller than 5.9375.
    _, state, _ = jitted_step(tx)(np.where(np.arange(128) % 4 == 0, -g / 2, g), state, p)
    stats = jadam.statistics(tx, state, p).total
    assert stats.zero_share == pytest.approx(0.25, abs=2 / p.size)


def test_the_corrections_of_scheduled_betas():
    """With scheduled betas the corrections are one minus the products of betas."""
    gs = [kernel(i)["w"].astype(np.float64) for i in range(1, 6)]
    p = {"w": np.ones_like(kernel(0)["w"])}
    state = jitted_init(SCHEDULED)(p)
    for g in gs:
        _, state, u = jitted_step(SCHEDULED)({"w": g.astype(np.float32)}, state, p)
    direction = oracle.adam_scheduled(gs, **SCHEDULES)[-1]
    for stats in jitted_statistics(SCHEDULED)(state, p, u):
        wanted = np.sqrt(np.mean(direction**2))
        np.testing.assert_allclose(stats.total.update_rms, wanted, rtol=p["w"].size * 2.0**-24)


ADAM = jadam.adam(1.0)


def test_quantiles_within_one_bin_and_not_finite():
    p = np.zeros((2, 50), np.float32)
    _, state, _ = jitted_step(ADAM)(p, jitted_init(ADAM)(p), p)
    stats = lambda u: jadam.statistics(ADAM, state, p, u.astype(np.float32)).total
    quantiles = lambda u: np.asarray(stats(u).step_quantiles)
    np.testing.assert_array_equal(quantiles(p), np.zeros(5))
    np.testing.assert_array_equal(quantiles(p - np.float32(1e-45)), np.zeros(5))
    # 100 values in the bin [2, 2.5): the q-quantile is interpolated to 2 + 0.5 q; a rank of 100 has one rounding
    np.testing.assert_allclose(quantiles(p - 2.25), 2 + QUANTILES * 0.5, rtol=2.0**-22)
    assert not np.isfinite(quantiles(p + np.inf)).any()
    assert not np.isfinite(stats(p + np.nan).update_rms)
    filled_from = lambda x, index: np.where(np.arange(100).reshape(p.shape) >= index, np.float32(x), p)
    assert np.isnan(quantiles(filled_from(np.nan, 99))).all()
    np.testing.assert_array_equal(quantiles(filled_from(np.inf, 90)), [0, 0, 0, 0, np.inf])
    half = filled_from(1.0, 50)  # half are 0, half in [1, 1.25)
    assert (quantiles(half)[:3] == 0).all()
    assert (quantiles(half)[3:] > 1).all()


def test_the_largest_steps():
    """Quantiles in the last finite bin, which ends at the largest float32."""
    p = np.full((2, 50), 3.4e38, np.float32)
    stats = jadam.statistics(ADAM, jitted_step(ADAM)(p, jitted_init(ADAM)(p), p)[1], p, p).total
    np.testing.assert_allclose([stats.update_rms, stats.update_ratio], [3.4e38, 1], rtol=100 * 2.0**-24)
    assert ((stats.step_quantiles >= 2.97e38) & (stats.step_quantiles < np.inf)).all()
    assert stats.moment_rms == np.inf  # v overflows


def test_quantiles_increase_and_lie_in_nonempty_bins():
    """Quantiles increase and lie in nonempty bins, for counts beyond 2**24 or fractional, and with gaps."""
    rng = np.random.default_rng(0)
    histograms = np.zeros((500, 1020))  # the bins of finite values
    for row in histograms:
        modes = rng.choice(20, rng.integers(1, 5), replace=False)
        for mode in modes:  # shares of 5, 20, ... %, so that quantiles often lie at the end of a mode
            width = rng.integers(1, 40)
            parts = rng.random(width) ** rng.integers(1, 20)
            row[51 * mode : 51 * mode + width] = rng.choice([1, 4, 5, 10]) * parts / parts.sum()
        row *= rng.choice([1e-3, 1e3, 1e9])
    histograms = np.pad(histograms, ((0, 0), (0, 4)))
    quantiles = np.asarray(jax.jit(_quantiles)(histograms.astype(np.float32)))
    assert (np.diff(quantiles) >= 0).all()
    for row, values in zip(histograms, quantiles, strict=True):
        bins = np.flatnonzero(row)
        within = (LOWER[bins] <= values[:, None]) & (values[:, None] <= UPPER[bins])
        assert within.any(1).all() or (not bins.size and not values.any())
        # 1,024 cumulative sums, each with a rounding error of 2**-24: together 2**-14 of the rank
        reached = np.cumsum(row) / max(row.sum(), 1e-30)
        for value, q in zip(values[: 5 * (bins.size > 0)], QUANTILES, strict=False):
            first = np.searchsorted(reached, q - 2.0**-14)
            last = min(np.searchsorted(reached, q + 2.0**-14), bins[-1])
            assert LOWER[first] <= value <= UPPER[last]


def test_squares_neither_overflow_nor_vanish():
    """Scaling parameters, moments and updates by a power of two scales the measures by it, to the bit."""
    tx, p = jadam.adamax(1e-2, eps=0.0), small_tree()
    p, state, _ = jax.tree.map(np.asarray, trained(tx, p))
    u = jax.tree.map(lambda p: p[..., ::-1] if p.ndim else p, p)
    stats = jax.tree.map(np.asarray, jadam.statistics(tx, state, p, u))
    for k in (-100, -70, 70, 118):
        scaled = lambda tree, k=k: jax.tree.map(lambda x: x * np.float32(2.0**k), tree)
        beyond = state[0]._replace(mu=scaled(state[0].mu), nu=scaled(state[0].nu))
        far = jadam.statistics(tx, (beyond, *state[1:]), scaled(p), scaled(u))
        for name, b in {"total": stats.total, **stats.leaves}.items():
            a = far.total if name == "total" else far.leaves[name]
            for field in ("moment_rms", "update_rms"):
                assert getattr(a, field) == getattr(b, field) * 2.0**k, (k, name, field)
            np.testing.assert_array_equal(a.step_quantiles, b.step_quantiles * 2.0**k, err_msg=f"{k} {name}")
            assert (a.update_ratio, a.snr) == (b.update_ratio, b.snr), (k, name)
        assert set(far.leaves) == set(stats.leaves)
    np.testing.assert_allclose(stats.total.update_ratio, 1, rtol=8729 * 2.0**-24)  # another order of the sum


def test_a_sample():
    """A sample is every k-th row, or element of a vector. If all rows are equal it has the statistics of the whole."""
    rows = np.random.default_rng(0).standard_normal((1, 128)).astype(np.float32)
    p = {"w": np.tile(rows, (64, 1)), "b": np.ones(1000, np.float32), "int8": np.tile(rows, (512, 1))}
    tx = jadam.adam(1e-2, moments="int8")
    _, plain, _ = jitted_step(ADAM)(p, jitted_init(ADAM)(p), p)
    both = jax.jit(lambda state, p: [jadam.statistics(ADAM, state, p, sample=n) for n in (256, None)])
    sampled, whole = both(plain, p)
    for a, b in zip_leaves(sampled, whole):
        # the total weighs leaves by their size; sums have at most 65,536 + 8,192 + 1,000 terms
        np.testing.assert_allclose(a, b, rtol=74728 * 2.0**-24)
    state = jax.eval_shape(tx.init, p)
    program = jax.make_jaxpr(lambda s, p: jadam.statistics(tx, s, p, sample=256))(state, p)
    program = program.eqns[0]  # the jitted function; the next equations unpack its results
    (adds,) = [e for e in program.params["jaxpr"].eqns if e.primitive.name == "scatter-add"]
    assert adds.outvars[0].aval.shape == (3 * 1024,)
    assert adds.invars[1].aval.shape[:-1] == (3, 256)  # two rows of each matrix; 250 elements of the vector, padded


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
def test_shape_of_a_sample(shape, wanted):
    """A sample has about ``2**15`` elements, cut along the longest axis; at least a row."""
    assert np.empty(shape)[measuring._subsample(shape, 2**15)].shape == wanted


@helpers.parametrize("most", [1, 4096], default=["4096"])
def test_batching_of_leaves(monkeypatch, most):
    """Statistics do not depend on the batching of leaves, except for the order of sums."""
    p, state, _ = trained(FORMATTED, tree())
    stats = jadam.statistics(FORMATTED, state, p)
    monkeypatch.setattr(measuring, "MAX_BATCH", most)
    rows = jax.jit(lambda state, p: measuring.measure(FORMATTED, None, state, p)[1])(state, p)
    for name, total, *each in zip(
        measuring.Measures._fields, *map(list, zip(*map(np.asarray, rows), strict=True)), strict=True
    ):
        np.testing.assert_allclose(total, getattr(stats.total, name), rtol=8729 * 2.0**-24, err_msg=name)
        for x, path in zip(each, stats.leaves, strict=True):
            wanted = getattr(stats.leaves[path], name)
            np.testing.assert_allclose(x, wanted, rtol=8729 * 2.0**-24, err_msg=f"{name} {path}")


def test_one_trace_and_pure():
    p = np.ones(3, np.float32)
    state = jitted_init(ADAM)(p)
    stats = jax.jit(functools.partial(jadam.statistics, ADAM))
    stats(state, p), stats(state, p)
    assert stats._cache_size() == 1
    p = tree()
    stats = jax.jit(functools.partial(jadam.statistics, FORMATTED))
    for updates in (None, p):
        text = stats.lower(jax.eval_shape(FORMATTED.init, p), p, updates).as_text()
        assert "callback" not in text
        assert "stablehlo.sort" not in text


@pytest.mark.usefixtures("strict")
def test_strict_promotion():
    tx = jadam.nadamw(rate, B1, optax.constant_schedule(B2))
    p, state, _ = trained(tx, small_tree())
    assert np.isfinite(jadam.statistics(tx, state, p).total.update_rms)


@pytest.mark.usefixtures("x64")
def test_complex_and_float64():
    rng = np.random.default_rng(0)
    p = {"z": rng.standard_normal(50) + 1j * rng.standard_normal(50), "x": rng.standard_normal(9)}
    tx = jadam.adam(RATE)
    u, state = jax.jit(tx.update)(p, jitted_init(tx)(p), p)
    small = lambda tree: {"z": tree["z"], "x": 1e-300 * np.asarray(tree["x"])}
    stats, far = jax.jit(lambda state, p, *far: (jadam.statistics(tx, state, p), jadam.statistics(tx, state, *far)))(
        state, p, small(p), small(u)
    )
    for name in p:
        wanted = expected(p[name], np.abs(p[name]), np.asarray(u[name]), p[name], 1e-8)
        check(stats.leaves[f"['{name}']"], wanted, np.asarray(u[name]), p[name].size, name)
    ratio, wanted = (x.leaves["['x']"].update_ratio for x in (far, stats))
    np.testing.assert_allclose(ratio, wanted, rtol=2.0**-23)
