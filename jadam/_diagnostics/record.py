"""`jadam.statistics` every so many steps, kept in the optimizer's state; and a look at them afterwards."""

import dataclasses
import functools
import io
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.numerics import apply_updates
from jadam._core.trees import find_states, leaf_name, params_with_gradients
from jadam._diagnostics.describe import html_table
from jadam._diagnostics.statistics import (
    QUANTILES,
    SCALARS,
    Measures,
    inferring_shardings,
    leaf_updates_of,
    measure,
    steps_taken,
    to_rows,
)
from jadam._transformation.transformation import FunctionUpdate, FusedUpdate, Transformation

COLUMNS = len(SCALARS) + len(QUANTILES)
BEGUN = (
    "To record training that has begun: record(tx).init(params)._replace(inner_state=state); with Flax NNX "
    "optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)."
)


class Ring(NamedTuple):
    """The last records, the oldest overwritten; its size never changes.

    ``steps`` int32 tells of which, -1 where none is yet; ``values`` float32 ``[keep, 1 + leaves, 11]`` are the
    `Measures` in total and of each parameter; ``names`` uint8 the paths, one a line.
    """

    steps: jax.Array
    values: jax.Array
    names: jax.Array
    of_all_parameters = True  # for jadam.describe, whatever shapes these arrays have


class RecordState(NamedTuple):
    """The state of what `record` wraps, and beside it the records."""

    inner_state: Any
    ring: Ring


class Record(Transformation):
    """What `record` returns."""


def record(
    tx: optax.GradientTransformation, every: int = 100, keep: int = 1000, *, sample: int | None = 2**15
) -> Record:
    """Keep `jadam.statistics` of every ``every``-th step beside the state, without leaving the device.

    Updates and `jadam.step`'s one pass are those of ``tx``. The steps between cost next to nothing. The records are a
    ring of fixed size, so that nothing is compiled anew and nothing grows; it is part of the state, so that it works
    under `jax.lax.scan`, on a mesh and with donation, and is saved and restored with it. Read it with `history`.

    It goes outside of `jadam.exact_bf16` and `jadam.chain`, and inside of `jadam.sharding.zero1` and of Optax's own,
    such as `optax.chain` and `optax.MultiSteps`. Training that has begun without it goes on with
    ``record(tx).init(params)._replace(inner_state=state)``, and without it again with ``state.inner_state``. With Flax
    NNX that is ``optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)`` of an optimizer
    made with ``record(tx)``. Steps are the inner optimizer's: within `optax.MultiSteps` one for all its mini-batches;
    what an `optax.chain` does to the updates afterwards is not seen. XLA takes about as long to compile a record as a
    small model.

    Args:
        tx: what `jadam.statistics` can look into.
        every: record when the number of steps taken is a multiple of this; >= 1.
        keep: how many records, >= 1; later ones overwrite the oldest. Each takes 44 bytes a parameter array. ``init``
            fixes it: restore a saved state into one of the same ``keep``.
        sample: of how many coordinates of each parameter, see `jadam.statistics`. The default, were they drawn at
            random, would tell a share to 0.3 %, standard deviation; a single NaN may lie between them. None: of all,
            which takes a CPU as long as some fifty steps.

    Returns:
        A transformation with state `RecordState`; ``update`` needs ``params``.

    Raises:
        TypeError: ``tx`` is none that `jadam.statistics` can look into, ``zero1`` among them.
        ValueError: ``every``, ``keep`` or ``sample`` out of range, a chain of other stages (at ``init``), or a
            `record` within another.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=2, keep=3)
        >>> def step(carry, _):
        ...     params, state = carry
        ...     return jadam.step(tx, {"w": params["w"] - 3.0}, state, params), None
        >>> params = {"w": jnp.ones(2)}
        >>> (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=11)
        >>> history = jadam.history(state)
        >>> print(history.steps, history.total["update_rms"].shape, list(history.leaves))
        [ 6  8 10] (3,) ["['w']"]
    """
    every, keep = checks.whole("every", every), checks.whole("keep", keep)
    sample = checks.whole("sample", sample, none=True)
    if not isinstance(tx, Transformation):
        remedy = (
            "Take jadam's for Optax's optimizer; Optax's wrappers and jadam.sharding.zero1 go around it: "
            "optax.MultiSteps(jadam.record(...), 4)."
        )
        raise TypeError(
            f"record needs one of jadam's optimizers, such as jadam.adam(...), got {checks.shown(tx)}. {remedy}"
        )
    if isinstance(tx, Record):
        raise ValueError("record must not be around another record. Drop one.")

    def init(params) -> Any:
        state = tx.init(params)
        found = []

        def look(state, params):
            found.extend(not leaf_update.frozen for leaf_update in leaf_updates_of(tx, state, params)[1])

        jax.eval_shape(look, state, params)
        paths = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        names = "\n".join(["total", *(path for path, on in zip(paths, found, strict=True) if on)])
        values = jnp.zeros((keep, 1 + sum(found), COLUMNS), jnp.float32)
        text = jnp.asarray(np.frombuffer(names.encode(), np.uint8))
        return RecordState(state, Ring(jnp.full(keep, -1, jnp.int32), values, text))

    after_step = functools.partial(_after_step, tx, every, sample)

    def update(updates, state, params=None, **extra_args) -> Any:
        if params is None:
            raise ValueError("record needs params: call update(updates, state, params).")
        checks.state_of(state, RecordState, BEGUN)
        params, _ = params_with_gradients(params, updates)
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        return updates, after_step(RecordState(inner, state.ring), apply_updates(params, updates))

    def fuse(updates, state, params) -> FusedUpdate:
        checks.state_of(state, RecordState, BEGUN)
        leaf_updates, rebuild_state = tx.update.fuse(updates, state.inner_state, params)
        return FusedUpdate(leaf_updates, lambda stored: RecordState(rebuild_state(stored), state.ring))

    text = f"jadam.record({tx!r}, every={every}, keep={keep}, sample={sample})"
    return Record(init, FunctionUpdate(fuse, text, tx, tx.update.needs_gradient_values, after_step, function=update))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # or eager calls would compile the loop at every step
def _after_step(tx, every, sample, state, params):
    """The new state with a record in it of itself and the new parameters, if it is time."""

    @inferring_shardings
    def written(inner, params, steps, values):
        """What the ring holds after this step."""

        def due(carry):
            rounds, *_ = carry
            return (rounds == 0) & (steps_taken(inner) % every == 0)

        def look(carry):
            rounds, steps, values = carry
            # What is looked at comes with the number of the round: XLA else takes the look ahead of the loop, always.
            rounds, seen, count = jax.lax.optimization_barrier((rounds, (inner, params), steps_taken(inner)))
            row = _row(measure(tx, sample, *seen)[1])
            slot = jnp.argmin(steps)
            put = lambda array, x: jax.lax.dynamic_update_index_in_dim(array, x, slot, 0)
            return rounds + 1, put(steps, count.astype(steps.dtype)), put(values, row)

        # A loop of no round or one, not a condition, out of which XLA would copy the ring at every step.
        return jax.lax.while_loop(due, look, (jnp.int32(0), steps, values))[1:]

    inner, ring, params = *jax.lax.stop_gradient(state), jax.lax.stop_gradient(params)
    return RecordState(state.inner_state, Ring(*written(inner, params, ring.steps, ring.values), ring.names))


def _row(measures: Measures) -> jax.Array:
    """What a record holds, ``[1 + leaves, 11]``."""
    return jnp.concatenate([jnp.stack(measures[:-1], axis=1), measures[-1]], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What `record` kept, oldest first, as NumPy arrays. Equal to itself alone.

    ``total`` and each of ``leaves`` map the names of `Measures` to arrays of a value for each of
    ``steps``; ``step_quantiles`` has a row of five.
    """

    steps: np.ndarray
    total: dict[str, np.ndarray]
    leaves: dict[str, dict[str, np.ndarray]]

    def frame(self) -> Any:
        """A `pandas.DataFrame`, indexed by step and parameter (``"total"`` among them); needs pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "frame needs pandas: pip install pandas. The arrays are in steps, total and leaves."
            ) from None
        columns = [*SCALARS, *(f"step_{100 * q:.0f}%" for q in QUANTILES)]
        parts = {}
        for name, x in {"total": self.total, **self.leaves}.items():
            values = np.column_stack([*(x[key] for key in SCALARS), x["step_quantiles"]])
            parts[name] = pandas.DataFrame(values, pandas.Index(self.steps, name="step"), columns)
        return pandas.concat(parts, names=["parameter"]).swaplevel().sort_index(level="step", sort_remaining=False)

    def __repr__(self):
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else ""
        return f"History({len(self.steps)} records of {len(self.leaves)} parameters{span})"

    def _repr_html_(self):
        """The last record as a table, for notebooks."""
        if not len(self.steps):
            return html_table([("parameter",)], [repr(self)])
        each = {"total": self.total, **self.leaves}
        last = {name: Measures(*(x[key][-1] for key in Measures._fields)) for name, x in each.items()}
        return html_table(to_rows(last), [f"{self!r}; the last one"])


def history(state) -> History:
    """Read what `record` keeps, wherever in ``state`` it is.

    Args:
        state: the state of a transformation that has `record` in it, once.

    Returns:
        A `History`, oldest first: ``steps``, ``total`` and ``leaves`` are NumPy arrays; ``frame()`` is a pandas frame
        where pandas is installed; draw it with `plot`.

    Raises:
        ValueError: no `RecordState` in ``state``, or several; one that `jax.vmap` made, for many trainings; arrays that
            were donated or deleted.
        TypeError: called within `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=1)
        >>> params = jnp.ones(2)
        >>> _, state = jadam.step(tx, jnp.ones(2), tx.init(params), params)
        >>> history = jadam.history(state)
        >>> print(history, history.total["snr"].round(3))
        History(1 records of 1 parameters, steps 1 to 1) [1.]
    """
    found = find_states(state, RecordState)
    if len(found) != 1:
        raise ValueError(
            f"state must hold the records of one record, found {len(found)} in {checks.shown(state)}. Train with "
            "jadam.record(...), and give its state; a saved one restored into what init returns, with Flax NNX "
            "optimizer.opt_state, and of several records one's state."
        )
    ring = found[0].ring
    checks.values(ring, "state.ring")
    if any(isinstance(x, jax.core.Tracer) for x in ring):
        raise TypeError("state must have values, got tracers. Call history outside of jax.jit.")
    if jnp.ndim(ring.steps) != 1:
        raise ValueError(
            f"state must be of one training, got steps of shape {ring.steps.shape}, as jax.vmap makes them. The first "
            "one's: history(jax.tree.map(lambda x: x[0], state))."
        )
    steps, values, names = map(np.asarray, ring)
    order = np.argsort(steps)[np.sum(steps < 0) :]
    steps, values = steps[order], values[order]

    def columns(x):
        return {**{name: x[:, i] for i, name in enumerate(SCALARS)}, "step_quantiles": x[:, len(SCALARS) :]}

    total, *leaves = (columns(values[:, i]) for i in range(values.shape[1]))
    return History(steps, total, dict(zip(names.tobytes().decode().split("\n")[1:], leaves, strict=True)))


def plot(history: History) -> Any:
    """Draw a `History`: step sizes, signal-to-noise ratio, and each parameter's update-to-parameter ratio.

    A dotted line marks the first record whose update is not finite, in whatever parameter; a number that is not
    finite is not drawn, a band from a quantile of 0 on starts at the smallest size that is.

    Args:
        history: what `history` returned, of one record at least.

    Returns:
        A `matplotlib.figure.Figure`; needs matplotlib.

    Raises:
        ValueError: no record, or none of a parameter.
        TypeError: no `History`.
        ImportError: no matplotlib.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=1)
        >>> params = jnp.ones(2)
        >>> _, state = jadam.step(tx, jnp.ones(2), tx.init(params), params)
        >>> figure = jadam.plot(jadam.history(state))
        >>> print([axes.get_xlabel() for axes in figure.axes[:3]])
        ['step', 'step', 'step']
    """
    if not isinstance(history, History):
        raise TypeError(f"plot needs what jadam.history returned, got {type(history).__name__}.")
    if not len(history.steps):
        raise ValueError("plot needs a history of one record at least, got none. Train for `every` steps.")
    if not history.leaves:
        raise ValueError("plot needs a history of one parameter at least, got none: there is none that is trained.")
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib.") from None

    class Shown(Figure):
        """A figure that a notebook shows also where matplotlib was not told so by ``%matplotlib inline``."""

        def _repr_png_(self):
            self.savefig(png := io.BytesIO(), format="png")
            return png.getvalue()

    plain = FuncFormatter(lambda x, _: f"{x:g}")  # powers of ten need mathtext, which old versions run with warnings
    minor = lambda x: plain if x.size and np.nanmax(x) < 10 * np.nanmin(x) else NullFormatter()  # less than a decade
    names = list(history.leaves)
    figure = Shown(figsize=(9, 6 + 0.16 * min(len(names), 40)), layout="constrained")
    top, low = figure.subplots(2, 1, height_ratios=[1, 1 + 0.05 * min(len(names), 40)])
    grid = top.get_gridspec()
    top.remove()
    sizes, snr = (figure.add_subplot(part) for part in grid[0].subgridspec(1, 2))
    blue, orange = "#0072b2", "#d55e00"  # Okabe & Ito's, which the colour-blind tell apart
    shown = history.total["step_quantiles"].T
    shown = np.where((shown > 0) & np.isfinite(shown), shown, np.nan)  # log has no 0
    drawn = np.isfinite(shown[2:]).any()
    for low_end, high_end in ((0, 4), (1, 3)) if drawn else ():
        reaches = np.isfinite(shown[high_end]) & np.isnan(shown[low_end])
        shown[low_end, reaches] = np.nanmin(shown)
    marker = lambda x: "o" if np.isfinite(x).sum() == 1 else None  # a line of one point is none
    sizes.fill_between(history.steps, shown[0], shown[4], color=blue, alpha=0.2, lw=0, label="5 to 95 %")
    sizes.fill_between(history.steps, shown[1], shown[3], color=blue, alpha=0.4, lw=0, label="25 to 75 %")
    sizes.plot(history.steps, shown[2], color=blue, marker=marker(shown[2]), label="median")
    sizes.set(
        xlabel="step", ylabel="|update| of a coordinate\n(parameters' unit)", title="step sizes (quantiles within 25 %)"
    )
    if drawn:
        sizes.set_yscale("log")
        sizes.yaxis.set_major_formatter(plain)
        sizes.yaxis.set_minor_formatter(minor(shown))
    lost = history.steps[~np.isfinite(history.total["update_rms"])]
    for axes in (sizes, snr):
        axes.margins(x=0.03)
        axes.update_datalim([(step, 1) for step in history.steps[[0, -1]]], updatey=False)
        if len(lost):
            axes.axvline(lost[0], color="0.3", ls=":", label="first record not finite")
    sizes.legend(frameon=False, fontsize="small")
    for name in names:
        snr.plot(history.steps, history.leaves[name]["snr"], color="0.7", lw=0.7)
    overall = history.total["snr"]
    snr.plot(history.steps, overall, color=orange, marker=marker(overall), label="all coordinates")
    snr.plot([], [], color="0.7", lw=0.7, label="each parameter")
    snr.set(xlabel="step", ylabel="mean |m̂| / √v̂ (no unit)", title="signal-to-noise ratio", ylim=(0, None))
    snr.legend(frameon=False, fontsize="small")
    ratio = np.array([history.leaves[name]["update_ratio"] for name in names]).reshape(len(names), len(history.steps))
    ratio = np.ma.masked_where(~(np.isfinite(ratio) & (ratio > 0)), ratio)
    mesh = low.pcolormesh(
        np.arange(len(history.steps) + 1),
        np.arange(len(names) + 1),
        ratio,
        cmap="cividis",
        norm=LogNorm() if ratio.count() else None,
    )
    at = np.unique(np.linspace(0, len(history.steps) - 1, 8).astype(int))
    low.set_xticks(at + 0.5, history.steps[at])
    every = -(-len(names) // 40)
    low.set_yticks(np.arange(0, len(names), every) + 0.5, names[::every], fontsize="small", parse_math=False)
    low.invert_yaxis()
    low.set(xlabel="step", title="update over parameter, root mean squares")
    bar = figure.colorbar(mesh, ax=low, label="ratio (no unit)", format=plain)
    bar.ax.yaxis.set_minor_formatter(minor(ratio.compressed()))
    return figure
