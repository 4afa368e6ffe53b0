"""Correctness checks of `benchmarks.gpu`: `jadam.step` on a device against XLA there, the CPU, and float64."""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jadam
from benchmarks.accuracy import exact, gradients
from benchmarks.gpu_sides import FORMATS, run_operations
from jadam._core.bf16 import join

SHAPES = [(), (7,), (300, 1000), (64, 777), (3, 5, 130), (4096,)]
SMALL_SHAPES = [(7,), (64, 777)]
COUNTS = (None, None, 1000)  # set before a step; at 1000 RAdam is rectified
EPS32 = 2.0**-23
KINDS = {  # dtypes of weights and gradients
    f"{weights} weights, {gradients} gradients": (weights, gradients)
    for weights, gradients in itertools.product(("float32", "bfloat16"), repeat=2)
}

# Tolerances, in float32's ulp of max(|old|, |increment|); for parameters of max(|old|, |increment|, learning rate),
# because the direction is rounded near 1 also where it cancels.
#
# A moment takes two operations, which may be contracted to one: 2 ulp.
# A direction takes two quotients and a root, which XLA approximates on a GPU to 2, 2 and 1 ulp, and we to as many.
# In int8, m and the scale of m / sqrt(v) take a further root and quotient each.
# A norm is summed in another order: log2 of the number of elements, halved, for the squares; 16 ulp with the division.
# A code differs where a threshold of its rounding lies between the results: 16 ulp are 2**-13 of a level of int8's
# ratio, which has 17 bits below it, and of a bfloat16's spacing, which has 16, so that 1e-3 is eight times as many.
# It then differs by one level, and by two across zero; in bfloat16 by one spacing, two ulp of the smaller neighbour.
# XLA may compute a master twice, once for the weight and once for its remainder, and round them differently at a tie:
# the weight is then a spacing off. Of a bfloat16's 2**16 float32 numbers a tie is within 2 ulp of 4.
TOLERANCES = {
    "parameters, ulp": 10,
    "float32 state, ulp": 2,
    "bfloat16 moments, bfloat16 ulp": 2,
    "int8 codes, levels": 2,
    "share of 16 and 8 bits that differ": 1e-3,
    "share of weights a bfloat16 spacing off": 1e-4,
    "integers": 0,
}
MORE_OF_INT8 = {"parameters, ulp": 10, "float32 state, ulp": 10}
MORE_OF_NORM = {"parameters, ulp": 16, "float32 state, ulp": 16}


class Row(NamedTuple):
    """One comparison: measured numbers and the largest that are allowed, by the same names."""

    name: str
    measured: dict[str, float]
    allowed: dict[str, float]
    note: str = ""

    @property
    def failures(self) -> list[str]:
        """Names of the numbers that are too large, or NaN."""
        return [k for k, x in self.measured.items() if not x <= self.allowed.get(k, np.inf)]


class Check(NamedTuple):
    """A named check; ``run(device, cpu)`` returns its rows. ``cpu`` is None where JAX has no CPU."""

    name: str
    run: Callable[..., list[Row]]


# ---------------------------------------------------------------- rules


def _family() -> dict[str, Callable]:
    """Every optimizer of jadam's, and the options that are rules of their own, as functions of ``moments``."""
    rules = {}
    for name in jadam.__all__:
        make = getattr(jadam, name)
        if callable(make) and make.__module__.startswith("jadam._optimizers.") and not name.startswith("scale_by_"):
            decays = "weight_decay" in inspect.signature(make).parameters
            rules[name] = functools.partial(make, 1.0, **({"weight_decay": 0.1} if decays else {}))
    rules["amsgrad, max_of v"] = functools.partial(jadam.amsgrad, 1.0, max_of="v")
    rules["radam, nesterov"] = functools.partial(jadam.radam, 1.0, nesterov=True)
    return rules


def _clipped() -> dict[str, Callable]:
    by_value, by_norm = lambda: jadam.clip(1.0), lambda: jadam.clip_by_global_norm(1.0)
    chains = {"clip": (by_value,), "clip by norm": (by_norm,), "clip, then by norm": (by_value, by_norm)}
    make = lambda clips, moments: jadam.chain(*(clip() for clip in clips), jadam.adam(1.0, moments=moments))
    return {name: lambda moments, clips=clips: make(clips, moments) for name, clips in chains.items()}


def _takes(make, moments) -> bool:
    """Whether a rule has this format."""
    try:
        make(moments=moments)
    except ValueError:
        return False
    return True


def checks(small: bool) -> list[Check]:
    """All checks, those of Adam first; for a CPU the others with one format each, and of two kinds."""
    shapes = SMALL_SHAPES if small else SHAPES
    found = []

    def rows(rules):
        for name, make in rules.items():
            formats = [x for x in FORMATS if _takes(make, x)]
            yield from ((name, make, x) for x in (formats[-1:] if small and name != "adam" else formats))

    family, clips = list(rows(_family())), list(rows(_clipped()))
    widened = [x for x in KINDS if x != "float32 weights, bfloat16 gradients"]  # clipping fuses float32 gradients only
    adam = [row for row in family if row[0] == "adam"]
    for name, make, moments in adam:
        found.append(Check(f"{name}, {moments}", functools.partial(_agreement, make, moments, shapes, [*KINDS])))
    for _, make, moments in adam:
        found.append(Check(f"NaN and infinity, {moments}", functools.partial(_not_finite, make, moments)))
    later = lambda row: row[0] in ("adamaxw", "nadamw")  # whose weight decay is adamw's
    found += [Check(f"float64, b2 {b2}", functools.partial(_against_float64, b2)) for b2 in (0.95, 0.999, 0.9999)]
    for name, make, moments in clips:
        more = MORE_OF_NORM if "norm" in name else {}
        run = functools.partial(_agreement, make, moments, shapes, widened, more)
        found.append(Check(f"{name}, {moments}", run))
    for name, make, moments in sorted(family, key=later):
        if name != "adam" and not (small and later((name,))):
            kinds = [*KINDS][:: 3 if small else 1]  # the first and the last
            found.append(Check(f"{name}, {moments}", functools.partial(_agreement, make, moments, shapes, kinds)))
    return found


# ---------------------------------------------------------------- agreement


def _random(seed, shapes, kinds, which) -> dict[str, list[np.ndarray]]:
    """Leaves of every kind, as weights (``which`` 0) or gradients (1). Elements spread over six decades."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)
    return {x: [np.asarray(draw(shape), jnp.dtype(KINDS[x][which])) for shape in shapes] for x in kinds}


def _update_and_apply(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def _masters(params, remainders):
    """Float32 parameters, from bfloat16 ones and their remainders."""
    joined = lambda p, r: join(p, r) if p.dtype == jnp.bfloat16 else p
    return jax.tree.map(joined, params, remainders)


def _on_host(params, state):
    """Float32 parameters and the inner state, as NumPy arrays."""
    masters = _masters(params, state.remainder)
    return jax.device_get((masters, state.inner_state))


def _agreement(make, moments, shapes, kinds, more=None, *, device, cpu) -> list[Row]:
    """Three steps of `jadam.step`, each from XLA's result of the one before."""
    tx = jadam.exact_bf16(make(moments=moments))
    step, xla = (jax.jit(functools.partial(f, tx)) for f in (jadam.step, _update_and_apply))
    params = jax.device_put(_random(0, shapes, kinds, 0), device)
    state = tx.init(params)
    compiled = None
    measured: dict[tuple[str, str], dict[str, float]] = {}
    for t, count in enumerate(COUNTS):
        if count is not None:
            state = optax.tree_utils.tree_set(state, count=jax.device_put(np.int32(count), device))
        args = jax.device_put(_random(t + 1, shapes, kinds, 1), device), state, params
        compiled = compiled or step.lower(*args).compile()
        old, new, expected = _on_host(params, state), compiled(*args), xla(*args)
        others = {"XLA": expected}
        if cpu is not None:
            others["the CPU"] = jax.device_put(step(*jax.device_put(args, cpu)), device)
        for other, result in others.items():
            results = _on_host(*new), _on_host(*result), old
            for kind in kinds:
                parts = (_of_kind(x, kind) for x in results)
                twice = other == "XLA" and kind.startswith("bfloat16")
                total = measured.setdefault((kind, other), {})
                for key, x in _differences(*parts, twice).items():
                    total[key] = max(total.get(key, 0), x)
        params, state = expected
    allowed = dict(TOLERANCES)
    for further in (MORE_OF_INT8 if moments == "int8" else {}, more or {}):
        allowed |= {key: allowed[key] + x for key, x in further.items()}
    calls = run_operations(compiled.as_text()).count("custom-call") if compiled is not None else 0
    note = f"{calls} kernel calls" if calls else "XLA alone"
    return [Row(f"{kind}, against {other}", x, allowed, note) for (kind, other), x in measured.items()]


def _of_kind(result, kind) -> tuple[list, list]:
    """Leaves of the parameters and of the state that belong to a kind; the state's also if to none, such as a count."""
    params, state = result
    others = [x for x in KINDS if x != kind]
    with_paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return params[kind], [x for path, x in with_paths if not any(y in jax.tree_util.keystr(path) for y in others)]


def _differences(new, expected, old, twice) -> dict[str, float]:
    """The largest differences of two results of a step from ``old``, by the names in `TOLERANCES`.

    ``twice``: whether ``expected`` may have computed a master twice. Weights that are a spacing off are then counted.
    """
    found = {"parameters, ulp": 0.0, "float32 state, ulp": 0.0}
    differ, total = 0, 0

    def add(key, x):
        found[key] = max(found.get(key, 0), float(x))

    for a, b, c in zip(*(x[0] for x in (new, expected, old)), strict=True):
        error = _relative(a, b, c, 1.0) / EPS32
        if twice:
            off = (error > TOLERANCES["parameters, ulp"]) & (np.abs(a - b) <= np.abs(b) * 2.0**-7)
            error = np.where(off, 0, error)
            add("share of weights a bfloat16 spacing off", np.mean(off))
        add("parameters, ulp", np.max(error))
    for a, b, c in zip(*(x[1] for x in (new, expected, old)), strict=True):
        if a.dtype == np.float32:
            add("float32 state, ulp", np.max(_relative(a, b, c)) / EPS32)
        elif a.dtype == jnp.bfloat16:
            add("bfloat16 moments, bfloat16 ulp", np.max(_relative(a, b, c)) / 2.0**-7)
        elif a.dtype.itemsize == 1:
            add("int8 codes, levels", np.max(np.abs(_level(a) - _level(b))))
        else:
            add("integers", np.max(np.abs(a.astype(np.int64) - b)))
        if a.dtype == jnp.bfloat16 or a.dtype.itemsize == 1:
            differ, total = differ + np.sum(a != b), total + a.size
    if total:
        add("share of 16 and 8 bits that differ", differ / total)
    return found


def _relative(a, b, old, least=0.0) -> np.ndarray:
    """Differences over max(|old|, |increment|, least). Equal infinities and NaN differ by 0."""
    a, b, old = (np.asarray(x, np.float64) for x in (a, b, old))
    with np.errstate(invalid="ignore"):
        error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, np.abs(a - b))
        scale = np.maximum(np.maximum(np.abs(old), np.abs(b - old)), least) + 1e-44
        return np.where(error == 0, 0, error / scale)


def _level(code) -> np.ndarray:
    """Codes as levels in order: int8 is sign and magnitude."""
    code = code.astype(np.int32)
    return np.where(code < 0, -(code + 128), code)


# ---------------------------------------------------------------- NaN, float64


def _not_finite(make, moments, *, device, cpu) -> list[Row]:
    """The same elements are finite after two steps with NaN, infinities, overflow and underflow in the gradient."""
    tx = make(moments=moments)
    step, xla = (jax.jit(functools.partial(f, tx)) for f in (jadam.step, _update_and_apply))
    rng = np.random.default_rng(0)
    params, grads = (rng.standard_normal((64, 777)).astype(np.float32) for _ in range(2))
    for i, bad in enumerate((np.nan, np.inf, -np.inf, 1e30, 1e-30, -0.0)):
        grads[i, 7 * i] = bad
    places = {"the device": (device, step), "XLA": (device, xla)} | ({} if cpu is None else {"the CPU": (cpu, step)})
    results = {}
    for name, (place, take) in places.items():
        g, p = jax.device_put((grads, params), place)
        with jax.default_device(place):
            state = tx.init(p)
        for _ in range(2):
            p, state = take(g, state, p)
        results[name] = [np.isfinite(np.asarray(x, np.float32)) for x in jax.tree.leaves((p, state))]
    own = results.pop("the device")
    rows = []
    for name, other in results.items():
        differ = sum(int(np.sum(a != b)) for a, b in zip(own, other, strict=True))
        rows.append(
            Row(f"finite elements, against {name}", {"elements that differ": differ}, {"elements that differ": 0})
        )
    return rows


def _against_float64(b2, *, device, cpu) -> list[Row]:
    """The largest error of a direction over 1,500 steps and 1,000 coordinates, and Optax's, which is not judged.

    Allowed is that of float64 with v stored in float32, and 4 ulp of the largest direction, for m, root and quotients.
    """
    g = gradients(1000, 1.0)
    expected = exact(g, b2)
    floor = np.abs(exact(g, b2, np.float32) - expected).max()
    zeros = np.zeros(g.shape[1], np.float32)

    def with_step(take, tx):
        def body(state, g_t):
            new, state = take(tx, g_t, state, zeros)
            return state, -new

        return jax.jit(lambda g: jax.lax.scan(body, tx.init(g[0]), g)[1])(jax.device_put(g, device))

    error = lambda found: float(np.abs(np.asarray(found, np.float64) - expected).max())
    own, other = (
        error(with_step(jadam.step, jadam.adam(1.0, b2=b2))),
        error(with_step(_update_and_apply, optax.adam(1.0, b2=b2))),
    )
    allowed: dict[str, Any] = {"error": float(floor + 4 * EPS32 * np.abs(expected).max())}
    return [Row("error of the direction", {"error": own, "Optax's error": other}, allowed)]
