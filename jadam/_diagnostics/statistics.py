r"""What Adam is doing, told from its state: how large its steps are, and how sure it is of them.

Kingma & Ba 2015, section 2.1, call :math:`\hat m_t / \sqrt{\hat v_t}` the signal-to-noise ratio: the closer to zero,
the less certain the direction, and the smaller the step.
"""

import functools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._checkpoints.convert import has_moments
from jadam._core import checks
from jadam._core.bf16 import join
from jadam._core.numerics import Beta, CurrentCorrection, at_least_float32, divide, real
from jadam._core.trees import find_states, leaf_name
from jadam._diagnostics.describe import html_table, table
from jadam._transformation.transformation import LeafUpdate, NotFusible, ScheduledBetasState, Transformation, update_of
from jadam._wrappers.by_path import ByPathState

QUANTILES = np.array([0.05, 0.25, 0.5, 0.75, 0.95], np.float32)
CUT = 21  # of a float32's bits, those that tell no bin: four bins an octave
BINS = 1 << 31 - CUT
EDGES = (np.arange(BINS + 1) << CUT).astype(np.uint32).view(np.float32)
LOWER = np.where(np.finfo(np.float32).tiny > EDGES[:-1], 0, EDGES[:-1])  # subnormal numbers count as 0
UPPER = np.fmin(EDGES[1:], np.finfo(np.float32).max)
UPPER[np.isinf(LOWER)] = np.inf  # a bin of its own
NANS = 1 + np.flatnonzero(np.isinf(LOWER))[0]  # the bins from here on
MAX_BATCH = 2**20  # coordinates that are looked at at once
SMALL = 2**10  # leaves up to here are of like size


class Measures(NamedTuple):
    """What `statistics` tells of one parameter, or of all together: float32 scalars, and five quantiles."""

    moment_rms: jax.Array  # root of the mean of v_hat
    update_rms: jax.Array
    update_ratio: jax.Array  # update_rms over the parameter's root mean square, 0 where that is 0
    snr: jax.Array  # mean of |m_hat| / sqrt(v_hat), 0 where v_hat is 0
    eps_share: jax.Array  # of the coordinates, those where eps is larger than sqrt(v_hat)
    zero_share: jax.Array  # of the coordinates, those that int8 rounds to a step of 0 although they had gradients
    step_quantiles: jax.Array  # of |update|, at QUANTILES


SCALARS = Measures._fields[:-1]


class Statistics(NamedTuple):
    """What `statistics` returns: `Measures` of all parameters together, and of each by its path. Prints as a table."""

    total: Measures
    leaves: dict[str, Measures]

    def __str__(self):
        return table(to_rows({"total": self.total, **self.leaves})) if self._has_numbers() else repr(self)

    def _repr_html_(self):
        """The table, for notebooks."""
        return html_table(to_rows({"total": self.total, **self.leaves})) if self._has_numbers() else None

    def _has_numbers(self) -> bool:
        """Whether each is what `statistics` tells: not traced by `jax.jit`, nor of many trainings by `jax.vmap`."""
        shapes = [[_shape(x) for x in measures or ()] for measures in (self.total, *self.leaves.values())]
        return all(each == [()] * len(SCALARS) + [QUANTILES.shape] for each in shapes)


def _shape(x) -> tuple[int, ...] | None:
    """An array's, None of what has no values."""
    return (
        x.shape if isinstance(x, (np.ndarray, np.generic, jax.Array)) and not isinstance(x, jax.core.Tracer) else None
    )


def to_rows(each: dict[str, Measures]) -> list[tuple[str, ...]]:
    """Rows of text, the first one the titles, for `table`."""
    rows: list[tuple[str, ...]] = [("parameter", *SCALARS, "median step, to 25 %")]
    for name, (*numbers, quantiles) in zip(each, jax.device_get(list(each.values())), strict=True):
        median = quantiles[len(QUANTILES) // 2]
        rows.append((name or "params", *(f"{x:.3g}" for x in numbers), f"{median:.2g}"))
    return rows


def statistics(
    tx: optax.GradientTransformation, state, params, updates=None, *, sample: int | None = None
) -> Statistics:
    r"""Tell what an optimizer of jadam's is doing, from the state after a step.

    Costs nothing unless called; it is pure, and compiled once for each ``tx`` and tree, which takes XLA as long as a
    small model and for many hundreds of parameters some 20 seconds. For each parameter that is not frozen,
    and in total, it gives (in the gradient's or the parameter's unit, or none)

    * ``moment_rms``: root mean square of the gradient, as the moments remember it, :math:`\sqrt{\text{mean}\,\hat v}`;
    * ``update_rms``, ``update_ratio``: of the update, and over that of the parameter;
    * ``snr``: mean of :math:`|\hat m| / \sqrt{\hat v}`, the paper's signal-to-noise ratio (section 2.1);
    * ``step_quantiles``: the 5, 25, 50, 75 and 95 % quantiles of the coordinates' step sizes, :math:`|update|`;
    * ``eps_share``: of the coordinates, those where ``eps`` is larger than :math:`\sqrt{\hat v}`;
    * ``zero_share``: those that ``moments="int8"`` holds with a first moment of 0 though they had gradients.

    :math:`\hat m` and :math:`\hat v` are corrected as in the step that made the state. :math:`\hat v` is Adam's, but
    for AMSGrad the largest so far, as its ``max_of`` has it; for AdaMax :math:`\sqrt{\hat v}` is the infinity norm
    :math:`\nu`, and eps dominates where it is more than half of that. Before the first step all are 0.

    Quantiles are read off a histogram of fixed bins, four in each octave ([1, 1.25), [1.25, 1.5), ... times a power of
    two), by linear interpolation within a bin: they are off by less than the bin, up to a quarter. Sorting would cost
    many steps.

    Args:
        tx: the transformation: one of jadam's optimizers, also by `jadam.by_path`, as the last stage of `jadam.chain`,
            in `jadam.exact_bf16`, `jadam.record` and `jadam.sharding.zero1`.
        state: its state; with Flax NNX ``optimizer.opt_state``.
        params: the parameters after the step; with Flax NNX ``nnx.state(model, nnx.Param)``.
        updates: what ``tx.update`` returned. Default: what the moments imply, learning rate and weight decay included.
            For NAdam, whose step has a share of the last gradient, that is taken to be :math:`\hat m`.
        sample: look at about so many coordinates of each parameter: evenly spaced indices of all axes but the last,
            fewest of the longest of these, or of a vector. A row of the last axis is looked at whole, and one at least.
            Default: all, which takes some 50 bytes each for as long as it looks.

    Returns:
        ``Statistics(total, leaves)``: `Measures` in total, and a dict of them by path, such as ``"['w']"``. Print it
        for a table, which a notebook shows by itself.

    Raises:
        TypeError: ``tx`` is none of the above, or ``state`` not its state.
        ValueError: a chain of other stages, or trees that do not match.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adam(0.1)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> params, state = jadam.step(tx, {"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
        >>> told = jadam.statistics(tx, state, params)
        >>> print(f"{told.total.moment_rms:.3f}")
        3.536
        >>> print(told)
        parameter  moment_rms  update_rms  update_ratio  snr  eps_share  zero_share  median step, to 25 %
        total            3.54         0.1        0.0619    1          0           0                   0.1
        ['w']            3.54         0.1        0.0619    1          0           0                   0.1
    """
    sample = checks.whole("sample", sample, none=True)
    tx = unwrap(tx)
    if "flax.nnx" in sys.modules:
        from jadam.flax import pure

        state, params, updates = pure((state, params, updates))
    if params is None:
        raise ValueError("statistics needs params, the parameters after the step.")
    if find_states(params, has_moments):
        raise TypeError(
            "params must be parameters, got an optimizer's state. The order is statistics(tx, state, params)."
        )
    checks.trainable(params, "params")
    for tree, what in ((state, "state"), (params, "params"), (updates, "updates")):
        checks.values(tree, what)
    if updates is not None:
        checks.trainable(updates, "updates")
        checks.same_tree(updates, params, "updates", "params")
    names, rows = _statistics(tx, sample, state, params, updates)
    total, *leaves = map(Measures._make, zip(*map(list, rows), strict=True))
    return Statistics(total, dict(zip(names, leaves, strict=True)))


@jax.tree_util.register_static
class _Names(tuple):
    """Paths, which are no arrays, on their way out of `jax.jit`."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(tx, sample, state, params, updates) -> tuple[_Names, Measures]:
    names, rows = measure(tx, sample, state, params, updates)
    return _Names(names), rows


def measure(tx: Transformation, sample, state, params, updates=None) -> tuple[list[str], Measures]:
    """The parameters' paths, and `Measures` whose arrays have a row for the total, then one for each of these."""
    names = []

    def measured(state, params, updates) -> Measures:
        count, leaf_updates = leaf_updates_of(tx, state, params)
        given = [None] * len(leaf_updates) if updates is None else jax.tree.leaves(updates)
        looked_at, numbers = [], []
        for leaf_update, (path, p), u in zip(
            leaf_updates, jax.tree_util.tree_leaves_with_path(params), given, strict=True
        ):
            if not leaf_update.frozen:
                names.append(leaf_name(path))
                numbers.append(np.size(p))
                looked_at.append(_measure_coordinates(leaf_update, count > 0, jnp.asarray(p), u, sample))
        if not names:
            none = jnp.zeros(1, jnp.float32)
            return Measures(none, none, none, none, none, none, jnp.zeros((1, len(QUANTILES)), jnp.float32))
        seen = np.array([math.prod(x.shape[1:]) for x in looked_at])
        batches = _batches(seen)
        back = np.argsort([i for batch in batches for i in batch])
        told = zip(*(_measure_leaves([looked_at[i] for i in batch]) for batch in batches), strict=True)
        sizes, shares, counts = (jnp.concatenate(x)[back] for x in told)

        def with_total(mean, each):
            each = each.T
            total = mean(each[:, None], np.array([sum(numbers)]), np.array(numbers, np.float32)[None, None])
            return jnp.concatenate([total, each], axis=1)

        v_hat, update, param = with_total(_root_mean_square, sizes)
        snr, eps, zero = with_total(_mean, shares)
        ratio = jnp.where(param == 0, 0, divide(update, param))
        counts *= (np.array(numbers) / np.maximum(1, seen)).astype(np.float32)[:, None]
        quantiles = _quantiles(jnp.concatenate([jnp.sum(counts, axis=0, keepdims=True), counts]))
        measures = Measures(v_hat, update, ratio, snr, eps, zero, quantiles)
        return jax.tree.map(lambda x: x.astype(jnp.float32), measures)

    with jax.numpy_dtype_promotion("standard"):  # complex numbers over real ones
        measures = inferring_shardings(measured)(state, params, updates)
    return names, measures


def inferring_shardings(f):
    """``f``, whose result every device has, also where a mesh's axes are `jax.sharding.AxisType.Explicit`.

    There JAX wants to be told the sharding of sums and of what is gathered from arrays of several shardings.
    """

    def inferring(*args) -> Any:
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args)]
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return f(*args)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=everywhere)(*args)

    return inferring


def unwrap(tx) -> Transformation:
    """``tx``, or what `jadam.sharding.zero1` is around; raises where that is opaque."""
    if isinstance(tx, optax.GradientTransformation) and update_of(tx).step is not None:
        tx = update_of(tx).inner
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"statistics needs one of jadam's optimizers, such as jadam.adam(...), got {checks.shown(tx)}. The order "
            "is statistics(tx, state, params); instead of optax.chain take jadam.chain."
        )
    return tx


def leaf_updates_of(tx: Transformation, state, params) -> tuple[jax.Array, list[LeafUpdate]]:
    """The number of steps taken, and for every leaf the `LeafUpdate` of the last of them."""
    none_new = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), at_least_float32(p)), params)
    for x in find_states(state, lambda x: isinstance(x, ByPathState) or has_moments(x)):
        if not isinstance(x, ByPathState):
            checks.same_tree(params, x.mu, "params", "state.mu", " With Flax NNX: nnx.state(model, nnx.Param).")
    try:
        leaf_updates = tx.update.fuse(none_new, _state_before_step(state), params).leaf_updates
    except NotFusible as reason:
        raise ValueError(
            f"statistics and record cannot look into the transformation: {reason}. Take the optimizer alone and its "
            "state, or optax.chain(..., record(...), ...)."
        ) from None
    return steps_taken(state), leaf_updates


def steps_taken(state) -> jax.Array:
    """The count beside the first moments in ``state``, int32."""
    return find_states(state, has_moments)[0].count


def _state_before_step(state):
    """The state before the step that made it, but for the moments; at least that before the first step."""

    def has_its_own(x):
        return isinstance(x, (ScheduledBetasState, ByPathState)) or "count" in getattr(x, "_fields", ())

    def reached(corrections) -> Any:
        return {name: CurrentCorrection(c) for name, c in corrections.items()}

    def one(x):
        if isinstance(x, ScheduledBetasState):
            return ScheduledBetasState(reached(x.corrections), one(x.inner_state))
        if isinstance(x, ByPathState):
            return ByPathState(one(x.moments), tuple(map(reached, x.corrections)))
        return x._replace(count=jnp.maximum(x.count - 1, 0)) if has_its_own(x) else x

    return jax.tree.map(one, state, is_leaf=has_its_own)


def _measure_coordinates(leaf_update: LeafUpdate, made, p, update, sample) -> jax.Array:
    """Three sizes and three shares, ``[6, 1, *shape]``, of the coordinates of a leaf that are looked at."""
    few = _subsample(p.shape, sample)
    p = p[few] if leaf_update.remainder is None else join(p[few], leaf_update.remainder[few])
    leaf_update = leaf_update._replace(stored=tuple(x[few] for x in leaf_update.stored))
    m, *others = leaf_update.format.decode(leaf_update.stored, leaf_update.dtype)
    m_hat = m / leaf_update.hyperparams.b1.correction
    root = leaf_update.rule.denominator(leaf_update.hyperparams, *others)
    update = _update_from_moments(leaf_update, m_hat, m, others, p) if update is None else update[few]
    eps = jnp.maximum(
        leaf_update.hyperparams.eps, jnp.sqrt(jnp.asarray(leaf_update.hyperparams.eps_root, real(leaf_update.dtype)))
    )
    own = root - eps if leaf_update.rule.eps_in_denominator else root
    zero = (
        (leaf_update.stored[0] == 0) & (leaf_update.stored[1] != 0)
        if leaf_update.format.name == "int8"
        else jnp.zeros([], bool)
    )
    snr = jnp.where(made & (root != 0), divide(jnp.abs(m_hat), root), 0)
    sizes = (jnp.where(made, root, 0), jnp.where(made, jnp.abs(update), 0), jnp.abs(p))
    shares = (snr, (eps > own) & made, jnp.broadcast_to(zero, p.shape))
    return jnp.stack([x[None] for x in (*sizes, *shares)])


def _batches(numbers) -> list[list[int]]:
    """Which leaves, of so many coordinates, are looked at together: of like sizes, within `MAX_BATCH`; or one alone.

    By itself each would take XLA a tenth of a second to compile, and every step, whether it records or not, the time
    to allocate scalars for its sums.
    """
    batches, widest = [], 0
    for i in np.argsort(-numbers, kind="stable"):
        if not batches or 2 * numbers[i] < widest > SMALL or widest * (1 + len(batches[-1])) > MAX_BATCH:
            batches.append([])
            widest = numbers[i]
        batches[-1].append(i)
    return batches


def _measure_leaves(batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Root mean squares and means, ``[leaves, 3]``, and ``[leaves, BINS]``, how many of the steps are in each bin."""
    numbers = np.array([math.prod(x.shape[1:]) for x in batch])
    unused = numbers.max() - numbers
    if len(batch) == 1:
        (side_by_side,) = batch  # in its shape, for it may be divided over devices
    else:
        flat = (jnp.pad(x.reshape(6, 1, -1), ((0, 0), (0, 0), (0, n))) for x, n in zip(batch, unused, strict=True))
        side_by_side = jnp.concatenate(list(flat), axis=1)
    sizes, shares = side_by_side[:3], side_by_side[3:]
    zeros, counts = jnp.split(_histograms(sizes[1]), [1], axis=1)
    counts = jnp.concatenate([zeros - unused.astype(np.float32)[:, None], counts], axis=1)
    return _root_mean_square(sizes, numbers).T, _mean(shares, numbers).T, counts


def _root_mean_square(x, numbers, weights=1) -> jax.Array:
    """As `_mean`. Squares are of parts of the largest, so that they neither overflow nor vanish."""
    axes = tuple(range(2, x.ndim))
    largest = jnp.max(x, axes, initial=0, keepdims=True)
    most = float(jnp.finfo(x.dtype).max) / 4  # XLA multiplies by the reciprocal, which must not vanish either
    unit = jnp.where((largest > 0) & (largest < jnp.inf), jnp.minimum(largest, most), 1)
    return jnp.squeeze(unit, axes) * jnp.sqrt(_mean(jnp.square(x / unit), numbers, weights))


def _mean(x, numbers, weights=1) -> jax.Array:
    """Of ``[3, leaves, ...]``, over all but two axes: of each leaf so many numbers, or what weighs as much."""
    return jnp.sum(x * weights, range(2, x.ndim)) / np.maximum(1, numbers).astype(np.float32)[None, :]


def _subsample(shape, sample):
    """The index of at most about ``sample`` elements, for every array whose axes but the last are ``shape``'s."""
    fewer = 1 if sample is None else -(-math.prod(shape) // sample)
    leading = shape[: max(1, len(shape) - 1)]
    index = [slice(None)] * len(leading)
    for axis in sorted(range(len(leading)), key=lambda axis: -leading[axis]):  # of stacked layers each, if it can be
        stride = max(1, min(fewer, leading[axis]))
        fewer = -(-fewer // stride)
        index[axis] = slice((stride - 1) // 2, None, stride)
    return tuple(index)


def _update_from_moments(leaf_update: LeafUpdate, m_hat, m, others, p):
    """The update that the moments imply: the rule with decay rates of 1, which leave the moments what they are."""
    hp, one = leaf_update.hyperparams, np.dtype(real(leaf_update.dtype)).type(1)
    hold = lambda beta: Beta(one, one - one, beta.correction, beta.next_b, beta.next_correction)
    hp = hp.replace(b1=hold(hp.b1), b2=hold(hp.b2))
    g = m_hat if leaf_update.rule.nesterov else jnp.zeros_like(m_hat)
    return leaf_update.apply_decay_and_lr(leaf_update.rule.function(hp, g, m, *others)[0], p)


def _histograms(sizes) -> jax.Array:
    """How many of each row's ``sizes``, which are >= 0, are in each bin."""
    sizes = sizes.astype(jnp.float32)
    sizes = jnp.where(sizes < np.finfo(np.float32).tiny, 0, sizes)
    bins = jax.lax.bitcast_convert_type(sizes, jnp.uint32) >> CUT
    row = jnp.arange(len(sizes), dtype=jnp.uint32).reshape(-1, *[1] * (sizes.ndim - 1))
    bins, row = jax.lax.optimization_barrier((bins, row))  # or XLA multiplies ahead of record's loop, at every step
    counts = jnp.zeros(BINS * len(sizes), jnp.uint32).at[BINS * row + bins].add(1)
    return counts.reshape(-1, BINS).astype(jnp.float32)


def _quantiles(histogram) -> jax.Array:
    """Where ``QUANTILES`` of each row, a histogram, lie, by linear interpolation in the first bin that reaches them.

    NaN where anything is, as a mean would be.
    """
    reached = jnp.where(histogram > 0, jnp.cumsum(histogram, axis=1), 0)  # a sum's roundings may reach an empty bin
    rank = jnp.asarray(QUANTILES)[None, :] * jnp.max(reached, axis=1, keepdims=True)
    i = jnp.argmax(reached[:, None, :] >= rank[:, :, None], axis=2)
    inside, until = (jnp.take_along_axis(x, i, axis=1) for x in (histogram, reached))
    lower, upper = jnp.asarray(LOWER)[i], jnp.asarray(UPPER)[i]
    share = jnp.clip(divide(rank - (until - inside), inside), 0, 1)
    told = jnp.where(lower == upper, lower, lower + share * (upper - lower))
    return jnp.where(jnp.any(histogram[:, NANS:] > 0, axis=1, keepdims=True), jnp.nan, told)
