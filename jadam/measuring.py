r"""What Adam is doing, told from its state: how large its steps are, and how sure it is of them.

Kingma & Ba 2015, section 2.1, call :math:`\hat m_t / \sqrt{\hat v_t}` the signal-to-noise ratio: the closer to zero,
the less certain the direction, and the smaller the step.
"""

import functools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam import _checks
from jadam._adam import nadam_rule
from jadam._adamax import adamax_rule
from jadam._amsgrad import amsgrad_of_v_rule, amsgrad_rule
from jadam._exact_bf16 import join
from jadam._formats import leaf_name
from jadam._numerics import Beta, Reached, abs_sq, at_least_float32, divide, real
from jadam._radam import radam_of_nadam_rule
from jadam._transformation import Job, NotOnePass, ScheduledBetasState, Transformation
from jadam.convert import has_moments
from jadam.groups import ByPathState

QUANTILES = np.array([0.05, 0.25, 0.5, 0.75, 0.95], np.float32)
CUT = 21  # of a float32's bits, those that tell no bin: four bins an octave
BINS = 1 << 31 - CUT
EDGES = np.minimum(np.arange(BINS + 1) << CUT, 0x7F800000).astype(np.uint32).view(np.float32)  # infinity at the end
EDGES[np.finfo(np.float32).tiny > EDGES] = 0  # subnormal numbers count as 0
ROOTS = {  # of what is called v_hat, from this step's scalars and the second moments
    adamax_rule: lambda step, u: u,
    amsgrad_rule: lambda step, v, v_max: jnp.sqrt(v_max),
    amsgrad_of_v_rule: lambda step, v, v_max: jnp.sqrt(v_max / step.b2.correction),
}
LOOK_AHEAD = (nadam_rule, radam_of_nadam_rule)


class Measures(NamedTuple):
    """What `statistics` tells of one parameter, or of all together: float32 scalars, and five quantiles."""

    moment_rms: jax.Array  # root of the mean of v_hat
    update_rms: jax.Array
    update_ratio: jax.Array  # update_rms over the parameter's root mean square, 0 where that is 0
    snr: jax.Array  # mean of |m_hat| / sqrt(v_hat), 0 where v_hat is 0
    eps_share: jax.Array  # of the coordinates, those where eps is larger than sqrt(v_hat)
    zero_share: jax.Array  # of the coordinates, those that int8 rounds to a step of 0 although they had gradients
    step_quantiles: jax.Array  # of |update|, at QUANTILES


class Statistics(NamedTuple):
    """What `statistics` returns: `Measures` of all parameters together, and of each by its path."""

    total: Measures
    leaves: dict[str, Measures]


def statistics(
    tx: optax.GradientTransformation, state, params, updates=None, *, sample: int | None = None
) -> Statistics:
    r"""Tell what an optimizer of jadam's is doing, from the state after a step.

    Costs nothing unless called; it is pure, and compiled once for each ``tx``. For each parameter that is not frozen,
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

    Quantiles are read off a histogram of fixed bins, a quarter of an octave each ([1, 1.25), [1.25, 1.5), ... times a
    power of two), by linear interpolation within a bin: they are off by less than a bin, a fifth. Sorting would
    cost many steps.

    Args:
        tx: the transformation: one of jadam's optimizers, also by `jadam.by_path`, in `jadam.chain` (after clipping),
            `jadam.exact_bf16`, `jadam.record` and `jadam.sharding.zero1`.
        state: its state; with Flax NNX ``optimizer.opt_state``.
        params: the parameters after the step; with Flax NNX ``nnx.state(model, nnx.Param)``.
        updates: what ``tx.update`` returned. Default: what the moments imply, learning rate and weight decay included.
            For NAdam, whose step has a share of the last gradient, that is taken to be :math:`\hat m`.
        sample: look at no more than about so many coordinates of each parameter: evenly spaced indices of all axes but
            the last, or of a vector. A row of the last axis is looked at whole. Default: all.

    Returns:
        ``Statistics(total, leaves)``: `Measures` in total, and a dict of them by path, such as ``"['w']"``.

    Raises:
        TypeError: ``tx`` is none of the above, or ``state`` not its state.
        ValueError: a chain of other stages, or trees that do not match.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.adam(0.1)
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> params, state = jadam.step(tx, {"w": jnp.array([3.0, -4.0])}, tx.init(params), params)
        >>> told = jadam.statistics(tx, state, params)
        >>> print(f"{told.total.moment_rms:.3f} {told.total.update_rms:.3f} {told.total.snr:.3f}")
        3.536 0.100 1.000
    """
    sample = _checks.whole("sample", sample, none=True)
    tx = opened(tx)
    if "flax.nnx" in sys.modules:
        from jadam.flax import pure

        state, params, updates = pure((state, params, updates))
    if params is None:
        raise ValueError("statistics needs params, the parameters after the step.")
    _checks.trainable(params, "params")
    for tree, what in ((state, "state"), (params, "params"), (updates, "updates")):
        _checks.values(tree, what)
    if updates is not None:
        _checks.trainable(updates, "updates")
        _checks.same_tree(updates, params, "updates", "params")
    return _statistics(tx, sample, state, params, updates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(tx, sample, state, params, updates) -> Statistics:
    names, stacked = in_rows(tx, sample, state, params, updates)
    total, *leaves = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(1 + len(names)))
    return Statistics(total, dict(zip(names, leaves, strict=True)))


def in_rows(tx: Transformation, sample, state, params, updates=None) -> tuple[list[str], Measures]:
    """The parameters' paths, and `Measures` whose arrays have a row for the total, then one for each of these."""
    count, jobs = looked_into(tx, state, params)
    given = [None] * len(jobs) if updates is None else jax.tree.leaves(updates)
    named = jax.tree_util.tree_leaves_with_path(params)
    with jax.numpy_dtype_promotion("standard"):  # complex numbers over real ones
        sums = {
            leaf_name(path): _sums(job, count > 0, jnp.asarray(p), u, sample)
            for job, (path, p), u in zip(jobs, named, given, strict=True)
            if not job.frozen
        }
    if not sums:
        return [], _measures(jax.tree.map(lambda x: x[None], _nothing()))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sums.values())
    total = jax.tree.map(lambda x: jnp.sum(x, 0, keepdims=True), stacked)
    return list(sums), _measures(jax.tree.map(lambda *x: jnp.concatenate(x), total, stacked))


def opened(tx) -> Transformation:
    """``tx``, or what `jadam.sharding.zero1` is around; raises where that is opaque."""
    tx = getattr(getattr(tx, "update", None), "divides", tx)
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"statistics needs one of jadam's optimizers, such as jadam.adam(...), got {_checks.shown(tx)}. Optax's "
            "chain cannot be looked into: take jadam.chain."
        )
    return tx


def looked_into(tx: Transformation, state, params) -> tuple[jax.Array, list[Job]]:
    """The number of steps taken, and for every leaf the `Job` of the last of them."""
    none_new = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), at_least_float32(p)), params)
    try:
        jobs = tx.plan(none_new, _rewound(state), params).jobs
    except NotOnePass as reason:
        raise ValueError(
            f"statistics and record cannot look into the transformation: {reason}. Take the optimizer alone and its "
            "state, or optax.chain(..., record(...), ...)."
        ) from None
    return steps_taken(state), jobs


def steps_taken(state) -> jax.Array:
    """The count beside the first moments in ``state``, int32."""
    return next(x.count for x in jax.tree.leaves(state, is_leaf=has_moments) if has_moments(x))


def _rewound(state):
    """The state before the step that made it, but for the moments; at least that before the first step."""

    def has_its_own(x):
        return isinstance(x, (ScheduledBetasState, ByPathState)) or "count" in getattr(x, "_fields", ())

    def reached(corrections) -> Any:
        return {name: Reached(c) for name, c in corrections.items()}

    def one(x):
        if isinstance(x, ScheduledBetasState):
            return ScheduledBetasState(reached(x.corrections), one(x.inner_state))
        if isinstance(x, ByPathState):
            return ByPathState(one(x.moments), tuple(map(reached, x.corrections)))
        return x._replace(count=jnp.maximum(x.count - 1, 0)) if has_its_own(x) else x

    return jax.tree.map(one, state, is_leaf=has_its_own)


class _Sums(NamedTuple):
    """Over the coordinates of one parameter or several, of what `Measures` are made of."""

    number: Any
    v_hat: Any
    update: Any  # squares
    param: Any  # squares
    snr: Any
    eps: Any
    zero: Any
    histogram: Any


def _sums(job: Job, made, p, update, sample) -> _Sums:
    whole, few = p.size, _few(p.shape, sample)
    p = p[few] if job.remainder is None else join(p[few], job.remainder[few])
    job = job._replace(stored=tuple(x[few] for x in job.stored))
    m, *others = job.format.decode(job.stored, job.dtype)
    m_hat = m / job.step.b1.correction
    root = ROOTS.get(job.rule, lambda step, v: jnp.sqrt(v / step.b2.correction))(job.step, *others)
    update = _implied(job, m_hat, m, others, p) if update is None else update[few]
    size = jnp.where(made, jnp.abs(update), 0)
    eps = jnp.maximum(job.step.eps, jnp.sqrt(getattr(job.step, "eps_root", 0 * job.step.eps)))
    own = root - eps if job.rule is adamax_rule else root
    zero = (job.stored[0] == 0) & (job.stored[1] != 0) if job.format.name == "int8" else jnp.zeros([], bool)
    weight = whole / max(1, p.size)  # of a coordinate that stands for several
    of_each = {
        "v_hat": jnp.where(made, jnp.square(root), 0),
        "update": jnp.square(size),
        "param": abs_sq(p),
        "snr": jnp.where(made, divide(jnp.abs(m_hat), root), 0),
        "eps": (eps > own) & made,
        "zero": jnp.broadcast_to(zero, p.shape),
    }
    # One sum for all: XLA on a CPU allocates scalars for each at every step, also in a branch that is not taken.
    sums = jnp.sum(jnp.stack([x.astype(jnp.float32) for x in of_each.values()]), range(1, 1 + p.ndim)) * weight
    return _Sums(jnp.float32(whole), histogram=_histogram(size) * weight, **dict(zip(of_each, sums, strict=True)))


def _few(shape, sample):
    """The index of at most about ``sample`` elements, for every array whose axes but the last are ``shape``'s."""
    fewer = 1 if sample is None else -(-math.prod(shape) // sample)
    index = []
    for size in shape[: max(1, len(shape) - 1)]:
        stride = max(1, min(fewer, size))
        fewer = -(-fewer // stride)
        index.append(slice((stride - 1) // 2, None, stride))
    return tuple(index)


def _implied(job: Job, m_hat, m, others, p):
    """The update that the moments imply: the rule with decay rates of 1, which leave the moments what they are."""
    step, one = job.step, np.dtype(real(job.dtype)).type(1)
    hold = lambda beta: Beta(one, one - one, beta.correction, beta.next_b, beta.next_correction)
    step = step.replace(b1=hold(step.b1), b2=hold(step.b2), momentum=getattr(step, "momentum", step.b1))
    g = m_hat if job.rule in LOOK_AHEAD else jnp.zeros_like(m_hat)
    return job.descended(job.rule(step, g, m, *others)[0], p)


def _nothing() -> _Sums:
    none = jnp.zeros([], jnp.float32)
    return _Sums(none, none, none, none, none, none, none, jnp.zeros(BINS, jnp.float32))


def _histogram(sizes) -> jax.Array:
    """How many of ``sizes``, which are >= 0, are in each bin."""
    sizes = sizes.astype(jnp.float32)
    sizes = jnp.where(sizes < np.finfo(np.float32).tiny, 0, sizes)
    bins = jax.lax.bitcast_convert_type(sizes, jnp.uint32) >> CUT
    return jnp.zeros(BINS, jnp.int32).at[bins].add(1).astype(jnp.float32)


def _quantiles(histogram) -> jax.Array:
    """Where ``QUANTILES`` of each row, a histogram, lie, by linear interpolation in the bin."""
    reached = jnp.cumsum(histogram, axis=1)
    rank = jnp.asarray(QUANTILES)[None, :] * reached[:, -1:]
    i = jnp.argmax(reached[:, None, :] >= rank[:, :, None], axis=2)
    inside, until = (jnp.take_along_axis(x, i, axis=1) for x in (histogram, reached))
    lower, upper = jnp.asarray(EDGES)[i], jnp.asarray(EDGES)[i + 1]
    return lower + divide(rank - (until - inside), inside) * (upper - lower)


def _measures(x: _Sums) -> Measures:
    """Of sums that are rows."""
    n = jnp.maximum(x.number, 1)
    rms = lambda squares: jnp.sqrt(squares / n)
    ratio = jnp.where(x.param == 0, 0, divide(rms(x.update), rms(x.param)))
    return Measures(rms(x.v_hat), rms(x.update), ratio, x.snr / n, x.eps / n, x.zero / n, _quantiles(x.histogram))
