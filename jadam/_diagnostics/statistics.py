r"""Statistics of Adam's gradients and updates, computed from its state.

Kingma & Ba 2015, section 2.1, call :math:`\hat m_t / \sqrt{\hat v_t}` the signal-to-noise ratio: the closer to zero,
the less certain the direction, and the smaller the step.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._checkpoints.convert import has_moments
from jadam._core import checks
from jadam._core.bf16 import join
from jadam._core.meshes import call_with_auto_axes
from jadam._core.numerics import Beta, CurrentCorrection, at_least_float32, divide, real, sqrt
from jadam._core.trees import find_states, leaf_names, params_tree, state_tree
from jadam._diagnostics.describe import html_table, table
from jadam._transformation.transformation import LeafUpdate, NotFusible, ScheduledBetasState, Transformation, update_of
from jadam._wrappers.by_path import ByPathState

QUANTILES = np.array([0.05, 0.25, 0.5, 0.75, 0.95], np.float32)
# Histogram bins are the leading bits of a float32: its exponent and 2 bits of its mantissa, so 4 bins per octave.
DROPPED_BITS = 21
BINS = 1 << 31 - DROPPED_BITS
EDGES = (np.arange(BINS + 1) << DROPPED_BITS).astype(np.uint32).view(np.float32)
LOWER = np.where(np.finfo(np.float32).tiny > EDGES[:-1], 0, EDGES[:-1])  # subnormal numbers count as 0
UPPER = np.fmin(EDGES[1:], np.finfo(np.float32).max)
UPPER[np.isinf(LOWER)] = np.inf  # infinity has its own bin
FIRST_NAN_BIN = 1 + np.flatnonzero(np.isinf(LOWER))[0]
MAX_BATCH = 2**20  # elements reduced together
SMALL = 2**10  # leaves of up to this many elements are batched whatever their sizes


class Measures(NamedTuple):
    """Statistics of one parameter, or of all together: float32 scalars, and five quantiles."""

    moment_rms: jax.Array  # sqrt(mean(v_hat))
    update_rms: jax.Array
    update_ratio: jax.Array  # update_rms / RMS of the parameter, 0 where that is 0
    snr: jax.Array  # mean of |m_hat| / sqrt(v_hat), 0 where v_hat is 0
    eps_share: jax.Array  # fraction of coordinates with eps > sqrt(v_hat)
    zero_share: jax.Array  # fraction of coordinates whose first moment int8 rounds to 0 despite nonzero gradients
    step_quantiles: jax.Array  # of |update|, at QUANTILES


SCALARS = Measures._fields[:-1]


class Statistics(NamedTuple):
    """Result of `statistics`: `Measures` of all parameters together, and of each one by its path. Prints as a table."""

    total: Measures
    leaves: dict[str, Measures]

    def __str__(self):
        return table(to_rows({"total": self.total, **self.leaves})) if self._is_concrete() else repr(self)

    def _repr_html_(self):
        """The table, for notebooks."""
        return html_table(to_rows({"total": self.total, **self.leaves})) if self._is_concrete() else None

    def _is_concrete(self) -> bool:
        """Whether all values are concrete and unbatched: neither tracers nor the result of `jax.vmap`."""
        expected = [()] * len(SCALARS) + [QUANTILES.shape]
        array = lambda x: isinstance(x, (np.ndarray, np.generic, jax.Array)) and not isinstance(x, jax.core.Tracer)
        shapes = lambda row: [x.shape if array(x) else None for x in row or ()]
        return all(shapes(row) == expected for row in (self.total, *self.leaves.values()))


def to_rows(measures: dict[str, Measures]) -> list[tuple[str, ...]]:
    """Rows of text for `table`, the first one the header."""
    rows: list[tuple[str, ...]] = [("parameter", *SCALARS, "median step (within 25 %)")]
    for name, (*scalars, quantiles) in zip(measures, jax.device_get(list(measures.values())), strict=True):
        median = quantiles[len(QUANTILES) // 2]
        rows.append((name or "params", *(f"{x:.3g}" for x in scalars), f"{median:.2g}"))
    return rows


def statistics(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    updates: optax.Updates | None = None,
    *,
    sample: int | None = None,
) -> Statistics:
    r"""Summarise what a jadam optimizer is doing, from the state after a step.

    A pure function, with no cost unless called. It is compiled once for each ``tx`` and tree, which takes about as long
    as compiling a small model, some 20 seconds for many hundreds of parameters. For each parameter that is not frozen,
    and in total, it computes (in the gradient's or the parameter's unit, or dimensionless)

    * ``moment_rms``: RMS (root mean square) of the gradient as the moments remember it,
      :math:`\sqrt{\text{mean}\,\hat v}`;
    * ``update_rms``, ``update_ratio``: RMS of the update, and its ratio to the RMS of the parameter;
    * ``snr``: mean of :math:`|\hat m| / \sqrt{\hat v}`, the paper's signal-to-noise ratio (section 2.1);
    * ``step_quantiles``: the 5, 25, 50, 75 and 95 % quantiles of :math:`|update|` over the coordinates;
    * ``eps_share``: the fraction of coordinates where ``eps`` is larger than :math:`\sqrt{\hat v}`;
    * ``zero_share``: the fraction whose first moment is 0 in ``moments="int8"`` although they had gradients.

    :math:`\hat m` and :math:`\hat v` are bias-corrected as in the last step. :math:`\hat v` is Adam's, with two
    exceptions. For AMSGrad it is the maximum so far, as ``max_of`` defines it. For AdaMax :math:`\sqrt{\hat v}` is the
    infinity norm :math:`\nu`, and ``eps_share`` counts where eps is more than half of it. Before the first step all
    statistics are 0.

    Quantiles are computed from a histogram with four bins per octave ([1, 1.25), [1.25, 1.5), ... times a power of
    two), by linear interpolation within a bin. Their error is less than the width of the bin, at most 25 %. Sorting
    would cost as much as many steps.

    Args:
        tx: one of jadam's optimizers, alone or by `jadam.by_path`, as the last stage of `jadam.chain`, or wrapped in
            `jadam.exact_bf16`, `jadam.record` and `jadam.sharding.zero1`.
        state: its state, or Flax's ``Optimizer`` or ``TrainState``.
        params: the parameters after the step, or an NNX module.
        updates: the updates that ``tx.update`` returned. Default: computed from the moments, with learning rate and
            weight decay. NAdam's update also depends on the last gradient, for which :math:`\hat m` is then taken.
        sample: use about this many coordinates of each parameter: evenly spaced indices along all axes but the last
            (along the only axis of a vector), the longest axis thinned out first. Rows of the last axis are used whole,
            one at least. Default: all coordinates, which takes some 50 bytes of memory per coordinate.

    Returns:
        ``Statistics(total, leaves)``: the `Measures` in total, and a dict of those of each parameter by its path, such
        as ``"['w']"``. It prints as a table, also in notebooks.

    Raises:
        TypeError: ``tx`` is not one of the above, or ``state`` is not its state.
        ValueError: a chain with other stages, or trees that do not match.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adam(0.1)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> params, state = jadam.step(tx, {"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
        >>> stats = jadam.statistics(tx, state, params)
        >>> print(f"{stats.total.moment_rms:.3f}")
        3.536
        >>> print(stats)
        parameter  moment_rms  update_rms  update_ratio  snr  eps_share  zero_share  median step (within 25 %)
        total            3.54         0.1        0.0619    1          0           0                        0.1
        ['w']            3.54         0.1        0.0619    1          0           0                        0.1
    """
    sample = checks.positive_int("sample", sample, none=True)
    tx = unwrap(tx)
    state, params, updates = state_tree(state), params_tree(params), params_tree(updates)
    if params is None:
        raise ValueError("statistics needs params, the parameters after the step.")
    if find_states(params, has_moments):
        raise TypeError(
            "params must be a tree of parameters, got an optimizer's state. Argument order: tx, state, params."
        )
    if updates is not None:
        updates = tx.update.without_untrainable(updates, params)
    params = tx.update.without_untrainable(params, params)
    checks.check_trainable(params, "params")
    for tree, what in ((state, "state"), (params, "params"), (updates, "updates")):
        checks.check_values(tree, what)
    if updates is not None:
        checks.check_trainable(updates, "updates")
        checks.check_same_tree(updates, params, "updates", "params")
    names, rows = _statistics(tx, sample, state, params, updates)
    total, *leaves = map(Measures._make, zip(*map(list, rows), strict=True))
    return Statistics(total, dict(zip(names, leaves, strict=True)))


@jax.tree_util.register_static
class _Names(tuple):
    """Leaf paths, as a static output of `jax.jit`."""


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(tx, sample, state, params, updates) -> tuple[_Names, Measures]:
    """`measure`, compiled."""
    names, rows = measure(tx, sample, state, params, updates)
    return _Names(names), rows


def measure(tx: Transformation, sample, state, params, updates=None) -> tuple[list[str], Measures]:
    """The parameters' paths, and `Measures` of arrays with a row for the total, then one for each parameter."""
    checks.check_constant_shapes(params, "statistics and record need")
    names = []

    def compute(state, params, updates) -> Measures:
        """`Measures` with a row for the total and one for each trained leaf."""
        count, leaf_updates = last_leaf_updates(tx, state, params)
        update_leaves = [None] * len(leaf_updates) if updates is None else jax.tree.leaves(updates)
        coordinates, sizes = [], []
        columns = leaf_updates, leaf_names(params), jax.tree.leaves(params), update_leaves
        for leaf_update, name, p, u in zip(*columns, strict=True):
            if not leaf_update.frozen:
                names.append(name)
                sizes.append(np.size(p))
                coordinates.append(_measure_coordinates(leaf_update, count > 0, jnp.asarray(p), u, sample))
        if not names:
            zero = jnp.zeros(1, jnp.float32)
            return Measures(zero, zero, zero, zero, zero, zero, jnp.zeros((1, len(QUANTILES)), jnp.float32))
        sampled = np.array([math.prod(x.shape[1:]) for x in coordinates])
        batches = _batch_by_size(sampled)
        original_order = np.argsort([i for batch in batches for i in batch])
        reduced = zip(*(_reduce_batch([coordinates[i] for i in batch]) for batch in batches), strict=True)
        rms, means, histograms = (jnp.concatenate(x)[original_order] for x in reduced)

        def with_total(mean, rows):
            """Columns ``[3, 1 + leaves]`` of ``rows`` ``[leaves, 3]``, the total first: ``mean`` weighted by size."""
            rows = rows.T
            total = mean(rows[:, None], np.array([sum(sizes)]), np.array(sizes, np.float32)[None, None])
            return jnp.concatenate([total, rows], axis=1)

        v_hat, update, param = with_total(_root_mean_square, rms)
        snr, eps, zero = with_total(_mean, means)
        ratio = jnp.where(param == 0, 0, divide(update, param))
        histograms *= (np.array(sizes) / np.maximum(1, sampled)).astype(np.float32)[:, None]
        quantiles = _quantiles(jnp.concatenate([jnp.sum(histograms, axis=0, keepdims=True), histograms]))
        measures = Measures(v_hat, update, ratio, snr, eps, zero, quantiles)
        return jax.tree.map(lambda x: x.astype(jnp.float32), measures)

    with jax.numpy_dtype_promotion("standard"):  # complex numbers are divided by real ones
        measures = call_with_auto_axes(compute, state, params, updates)
    return names, measures


def unwrap(tx) -> Transformation:
    """``tx`` without `jadam.sharding.zero1` around it; raises unless it is one of jadam's transformations."""
    if isinstance(tx, optax.GradientTransformation) and update_of(tx).step is not None:
        tx = update_of(tx).inner
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"statistics needs a jadam optimizer, such as jadam.adam(...), got {checks.short_repr(tx)}. Argument "
            "order: tx, state, params. Use jadam.chain instead of optax.chain."
        )
    return tx


def last_leaf_updates(tx: Transformation, state, params) -> tuple[jax.Array, list[LeafUpdate]]:
    """The step count, and the `LeafUpdate` of each leaf at the last step."""
    zero_grads = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), at_least_float32(p)), params)
    for x in find_states(state, lambda x: isinstance(x, ByPathState) or has_moments(x)):
        if not isinstance(x, ByPathState):
            checks.check_same_tree(params, x.mu, "params", "state.mu", " With Flax NNX: nnx.state(model, nnx.Param).")
    try:
        leaf_updates = tx.update.leafwise(zero_grads, _state_before_step(state), params).leaf_updates
    except NotFusible as reason:
        raise ValueError(
            f"statistics and record do not support this transformation: {reason}. Pass a jadam optimizer "
            "alone, with its own state; in a chain: optax.chain(..., jadam.record(...), ...)."
        ) from None
    return steps_taken(state), leaf_updates


def steps_taken(state) -> jax.Array:
    """The step count of the first Adam state in ``state``, int32."""
    return find_states(state, has_moments)[0].count


def _state_before_step(state):
    """``state`` with the hyperparameters of its last step: counts one lower, moments unchanged.

    Counts of 0 stay 0. Bias corrections of scheduled betas become `CurrentCorrection`.
    """

    def has_count(x):
        """Whether ``x`` is a state that counts steps."""
        return isinstance(x, (ScheduledBetasState, ByPathState)) or "count" in getattr(x, "_fields", ())

    def as_current(corrections) -> Any:
        """Mark bias corrections as those of the last step itself."""
        return {name: CurrentCorrection(c) for name, c in corrections.items()}

    def rewind(x):
        """Set one state back by a step."""
        if isinstance(x, ScheduledBetasState):
            return ScheduledBetasState(as_current(x.corrections), rewind(x.inner_state))
        if isinstance(x, ByPathState):
            return ByPathState(rewind(x.moments), tuple(map(as_current, x.corrections)))
        return x._replace(count=jnp.maximum(x.count - 1, 0)) if has_count(x) else x

    return jax.tree.map(rewind, state, is_leaf=has_count)


def _measure_coordinates(leaf_update: LeafUpdate, has_stepped, p, update, sample) -> jax.Array:
    """Six measures of each sampled coordinate, ``[6, 1, *shape]``.

    For root mean squares: sqrt(v_hat), |update|, |parameter|. For means: SNR, whether eps dominates, whether int8
    rounds m to 0. All but the parameter and the last are 0 before the first step.
    """
    index = _subsample(p.shape, sample)
    p = p[index] if leaf_update.remainder is None else join(p[index], leaf_update.remainder[index])
    leaf_update = leaf_update._replace(stored=tuple(x[index] for x in leaf_update.stored))
    m, *others = leaf_update.format.decode(leaf_update.stored, leaf_update.dtype)
    m_hat = m / leaf_update.hyperparams.b1.correction
    root = leaf_update.rule.denominator(leaf_update.hyperparams, *others)
    update = _update_from_moments(leaf_update, m_hat, m, others, p) if update is None else update[index]
    eps = jnp.maximum(
        leaf_update.hyperparams.eps, sqrt(jnp.asarray(leaf_update.hyperparams.eps_root, real(leaf_update.dtype)))
    )
    root_without_eps = root - eps if leaf_update.rule.eps_in_moment else root
    rounded_to_zero = (
        (m == 0) & (leaf_update.stored[1] > 1)  # the lowest code of v, 1, is also that of 0
        if leaf_update.format.name == "int8"
        else jnp.zeros([], bool)
    )
    snr = jnp.where(has_stepped & (root != 0), divide(jnp.abs(m_hat), root), 0)
    for_rms = (jnp.where(has_stepped, root, 0), jnp.where(has_stepped, jnp.abs(update), 0), jnp.abs(p))
    for_mean = (snr, (eps > root_without_eps) & has_stepped, jnp.broadcast_to(rounded_to_zero, p.shape))
    return jnp.stack([x[None] for x in (*for_rms, *for_mean)])


def _batch_by_size(sizes) -> list[list[int]]:
    """Group leaves of similar size into batches of at most `MAX_BATCH` elements; a larger leaf is a batch of its own.

    Unbatched, each leaf would take XLA a tenth of a second to compile. It would also cost every step, recording or not,
    the time to allocate scalars for its sums.
    """
    batches, widest = [], 0
    for i in np.argsort(-sizes, kind="stable"):
        if not batches or 2 * sizes[i] < widest > SMALL or widest * (1 + len(batches[-1])) > MAX_BATCH:
            batches.append([])
            widest = sizes[i]
        batches[-1].append(i)
    return batches


def _reduce_batch(batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """RMS values and means, each ``[leaves, 3]``, and histograms of |update|, ``[leaves, BINS]``."""
    sizes = np.array([math.prod(x.shape[1:]) for x in batch])
    padding = sizes.max() - sizes
    if len(batch) == 1:
        (stacked,) = batch  # not flattened, because it may be sharded
    else:
        flat = (jnp.pad(x.reshape(6, 1, -1), ((0, 0), (0, 0), (0, n))) for x, n in zip(batch, padding, strict=True))
        stacked = jnp.concatenate(list(flat), axis=1)
    for_rms, for_mean = stacked[:3], stacked[3:]
    zeros, counts = jnp.split(_histograms(for_rms[1]), [1], axis=1)
    counts = jnp.concatenate([zeros - padding.astype(np.float32)[:, None], counts], axis=1)
    return _root_mean_square(for_rms, sizes).T, _mean(for_mean, sizes).T, counts


def _root_mean_square(x, sizes, weights=1) -> jax.Array:
    """Like `_mean`. Values are divided by the maximum before they are squared, to avoid overflow and underflow."""
    axes = tuple(range(2, x.ndim))
    largest = jnp.max(x, axes, initial=0, keepdims=True)
    limit = float(jnp.finfo(x.dtype).max) / 4  # XLA multiplies by the reciprocal, which must not underflow
    unit = jnp.where((largest > 0) & (largest < jnp.inf), jnp.minimum(largest, limit), 1)
    return jnp.squeeze(unit, axes) * sqrt(_mean(jnp.square(x / unit), sizes, weights))


def _mean(x, sizes, weights=1) -> jax.Array:
    """Mean of ``x``, ``[3, leaves, ...]``, over all but its first two axes; ``sizes`` are the sums of the weights."""
    return jnp.sum(x * weights, range(2, x.ndim)) / np.maximum(1, sizes).astype(np.float32)[None, :]


def _subsample(shape, sample):
    """An index of about ``sample`` elements of an array; also valid for another last axis, such as that of scales."""
    remaining = 1 if sample is None else -(-math.prod(shape) // sample)  # factor by which to reduce the elements
    leading = shape[: max(1, len(shape) - 1)]
    index = [slice(None)] * len(leading)
    for axis in sorted(range(len(leading)), key=lambda axis: -leading[axis]):  # keeps the short axis of stacked layers
        stride = max(1, min(remaining, leading[axis]))
        remaining = -(-remaining // stride)
        index[axis] = slice((stride - 1) // 2, None, stride)
    return tuple(index)


def _update_from_moments(leaf_update: LeafUpdate, m_hat, m, others, p):
    """The update computed from the moments: the rule with decay rates of 1, which leave the moments unchanged.

    ``p`` is the parameter after the step. Weight decay is of the one before, which is (p - u) / (1 - lr * weight_decay)
    if u is the update without decay.
    """
    hp, one = leaf_update.hyperparams, np.dtype(real(leaf_update.dtype)).type(1)
    with_rate_1 = lambda beta: Beta(one, one - one, beta.correction, beta.next_b, beta.next_correction)
    hp = hp.replace(b1=with_rate_1(hp.b1), b2=with_rate_1(hp.b2))
    g = m_hat if leaf_update.rule.nesterov else jnp.zeros_like(m_hat)
    direction, *_ = leaf_update.rule.function(hp, g, m, *others)
    if leaf_update.weight_decay is None:
        return leaf_update.apply_decay_and_lr(direction, p)
    without_decay = leaf_update._replace(weight_decay=None).apply_decay_and_lr(direction, p)
    before = divide(p.astype(leaf_update.dtype) - without_decay, 1 + leaf_update.minus_lr * leaf_update.weight_decay)
    return leaf_update.apply_decay_and_lr(direction, before)


def _histograms(x) -> jax.Array:
    """Counts of the values in each row of ``x``, >= 0 or NaN, in histogram bins: ``[rows, BINS]``."""
    x = x.astype(jnp.float32)
    x = jnp.where(x < np.finfo(np.float32).tiny, 0, x)
    bins = jax.lax.bitcast_convert_type(x, jnp.uint32) >> DROPPED_BITS
    row = jnp.arange(len(x), dtype=jnp.uint32).reshape(-1, *[1] * (x.ndim - 1))
    bins, row = jax.lax.optimization_barrier((bins, row))  # or XLA hoists BINS * row out of record's loop
    counts = jnp.zeros(BINS * len(x), jnp.uint32).at[BINS * row + bins].add(1)
    return counts.reshape(-1, BINS).astype(jnp.float32)


def _quantiles(histogram) -> jax.Array:
    """`QUANTILES` of each row of ``histogram``, by linear interpolation in the first bin that reaches them.

    NaN if the row has a NaN, as its mean would be.
    """
    cumulative = jnp.where(histogram > 0, jnp.cumsum(histogram, axis=1), 0)  # rounding may make empty bins reach a rank
    rank = jnp.asarray(QUANTILES)[None, :] * jnp.max(cumulative, axis=1, keepdims=True)
    i = jnp.argmax(cumulative[:, None, :] >= rank[:, :, None], axis=2)
    in_bin, through_bin = (jnp.take_along_axis(x, i, axis=1) for x in (histogram, cumulative))
    lower, upper = jnp.asarray(LOWER)[i], jnp.asarray(UPPER)[i]
    fraction = jnp.clip(divide(rank - (through_bin - in_bin), in_bin), 0, 1)
    quantiles = jnp.where(lower == upper, lower, lower + fraction * (upper - lower))
    return jnp.where(jnp.any(histogram[:, FIRST_NAN_BIN:] > 0, axis=1, keepdims=True), jnp.nan, quantiles)
