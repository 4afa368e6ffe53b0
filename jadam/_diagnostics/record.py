"""Record `jadam.statistics` in the optimizer's state every few steps; read and plot them afterwards."""

from __future__ import annotations

import dataclasses
import functools
import io
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.meshes import call_with_auto_axes
from jadam._core.numerics import apply_updates
from jadam._core.trees import find_states, leaf_names, params_with_gradients
from jadam._diagnostics.describe import html_table
from jadam._diagnostics.statistics import (
    QUANTILES,
    SCALARS,
    Measures,
    last_leaf_updates,
    measure,
    steps_taken,
    to_rows,
)
from jadam._transformation.transformation import CustomUpdateFn, LeafwiseUpdate, Transformation

if TYPE_CHECKING:
    import matplotlib.figure

COLUMNS = len(SCALARS) + len(QUANTILES)
MAX_LABEL = 40  # characters of a parameter's name in a plot
REMEDY_FOR_BARE_STATE = (
    "To add record to a running training: record(tx).init(params)._replace(inner_state=state); with Flax NNX: "
    "optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)."
)


class Ring(NamedTuple):
    """A ring buffer of the last ``keep`` records.

    ``steps``, int32 ``[keep]``, is the step of each record, -1 for an empty slot. ``values``, float32
    ``[keep, 1 + leaves, 11]``, has the `Measures` in total and of each parameter. ``names``, uint8, has the parameters'
    paths as text, one per line.
    """

    steps: jax.Array
    values: jax.Array
    names: jax.Array
    belongs_to_no_param = True  # jadam.describe counts it under no parameter, whatever the shapes of its arrays


class RecordState(NamedTuple):
    """State of `record`: that of the wrapped transformation, and the records."""

    inner_state: optax.OptState
    ring: Ring


class Record(Transformation):
    """The transformation that `record` returns."""


def record(
    tx: optax.GradientTransformation, every: int = 100, keep: int = 1000, *, sample: int | None = 2**15
) -> Record:
    """Record `jadam.statistics` in the state at every ``every``-th step, without leaving the device.

    Updates are those of ``tx``, and `jadam.step` is fused if it is for ``tx``. Steps without a record cost next to
    nothing. The records are a ring buffer of fixed size, so nothing recompiles and memory does not grow. The buffer is
    part of the state: it works under `jax.lax.scan`, on a mesh and with donation, and is saved and restored with the
    state. Read it with `history`.

    Put `record` around `jadam.exact_bf16` and `jadam.chain`, and inside `jadam.sharding.zero1` and Optax's wrappers,
    such as `optax.chain` and `optax.MultiSteps`. Steps are those of ``tx``: with `optax.MultiSteps` one for
    several mini-batches. Changes that later stages of an `optax.chain` make to the updates are not recorded.

    To add `record` to a running training, use the state ``record(tx).init(params)._replace(inner_state=state)``. To
    remove it, continue with ``state.inner_state``. With Flax NNX, make an optimizer with ``record(tx)`` and set
    ``optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)``.

    Compiling the statistics takes XLA about as long as compiling a small model, once for each ``tx``. In a notebook
    make ``tx`` once: what was compiled for others stays in memory until `jax.clear_caches`.

    Args:
        tx: a transformation that `jadam.statistics` supports, except `jadam.sharding.zero1`.
        every: record when the number of steps taken is a multiple of this; >= 1.
        keep: the number of records to keep, >= 1; later ones overwrite the oldest. A record takes 44 bytes per
            parameter array. ``init`` fixes this size: restore a saved state into one with the same ``keep``.
        sample: the number of coordinates of each parameter to use, see `jadam.statistics`. With the default, a fraction
            has a standard error of 0.3 %, if the coordinates are as good as random. A single NaN may be missed. None
            uses all coordinates, which takes a CPU as long as about fifty steps.

    Returns:
        A transformation with state `RecordState`; ``update`` needs ``params``.

    Raises:
        TypeError: `jadam.statistics` does not support ``tx``, or ``tx`` is a `jadam.sharding.zero1`.
        ValueError: ``every``, ``keep`` or ``sample`` is out of range, a chain has other stages (at ``init``), or ``tx``
            is a `record`.

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
    every, keep = checks.positive_int("every", every), checks.positive_int("keep", keep)
    sample = checks.positive_int("sample", sample, none=True)
    if not isinstance(tx, Transformation):
        raise TypeError(
            f"record needs a jadam optimizer, such as jadam.adam(...), got {checks.short_repr(tx)}. Optax's wrappers "
            "and jadam.sharding.zero1 must be outside: optax.MultiSteps(jadam.record(...), 4)."
        )
    if isinstance(tx, Record):
        raise ValueError("record must not be applied to another record. Remove one.")

    def init(params) -> Any:
        params = tx.update.without_untrainable(params, params)
        state = tx.init(params)
        recorded = []
        is_trained = lambda state, params: [not leaf.frozen for leaf in last_leaf_updates(tx, state, params)[1]]
        jax.eval_shape(lambda *args: recorded.extend(is_trained(*args)), state, params)
        names = ["total", *(name for name, on in zip(leaf_names(params), recorded, strict=True) if on)]
        values = jnp.zeros((keep, 1 + sum(recorded), COLUMNS), jnp.float32)
        names = jnp.asarray(np.frombuffer("\n".join(names).encode(), np.uint8))
        return RecordState(state, Ring(jnp.full(keep, -1, jnp.int32), values, names))

    after_step = functools.partial(_after_step, tx, every, sample)

    def update(updates, state, params=None, **extra_args) -> Any:
        """The inner ``update``, then a record of the new state and parameters if one is due."""
        if params is None:
            raise ValueError("record needs params: call update(updates, state, params).")
        checks.check_state_type(state, RecordState, REMEDY_FOR_BARE_STATE)
        params, _ = params_with_gradients(params, updates)
        updates, inner = tx.update(updates, state.inner_state, params, **extra_args)
        return updates, after_step(RecordState(inner, state.ring), apply_updates(params, updates))

    def leafwise(updates, state, params) -> LeafwiseUpdate:
        """The inner optimizer's `LeafwiseUpdate`; `jadam.step` calls ``after_step`` for the record."""
        checks.check_state_type(state, RecordState, REMEDY_FOR_BARE_STATE)
        leaf_updates, rebuild_state = tx.update.leafwise(updates, state.inner_state, params)
        return LeafwiseUpdate(leaf_updates, lambda arrays: RecordState(rebuild_state(arrays), state.ring))

    return Record(
        init,
        CustomUpdateFn(
            leafwise,
            f"jadam.record({tx!r}, every={every}, keep={keep}, sample={sample})",
            tx,
            tx.update.needs_gradient_values,
            after_step,
            is_frozen=tx.update.is_frozen,
            fills_frozen=tx.update.fills_frozen,
            function=update,
        ),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # eager calls would compile the loop at every step
def _after_step(tx, every, sample, state, params):
    """The state with a new record of it and of the new parameters, if the step count is a multiple of ``every``."""

    def write_record(inner, params, steps, values):
        """The ring's ``steps`` and ``values`` after this step."""
        is_due = lambda carry: (carry[0] == 0) & (steps_taken(inner) % every == 0)

        def write(carry):
            """Compute the statistics and put them in place of the oldest record."""
            iteration, steps, values = carry
            # Tie the inputs to the loop counter, or XLA hoists the statistics out of the loop and runs them every step.
            iteration, inputs, count = jax.lax.optimization_barrier((iteration, (inner, params), steps_taken(inner)))
            *scalars, quantiles = measure(tx, sample, *inputs)[1]
            row = jnp.concatenate([jnp.stack(scalars, axis=1), quantiles], axis=1)
            slot = jnp.argmin(steps)
            put = lambda array, x: jax.lax.dynamic_update_index_in_dim(array, x, slot, 0)
            return iteration + 1, put(steps, count.astype(steps.dtype)), put(values, row)

        # A loop of at most one iteration instead of lax.cond, for which XLA would copy the ring at every step.
        return jax.lax.while_loop(is_due, write, (jnp.int32(0), steps, values))[1:]

    inner, ring, params = *jax.lax.stop_gradient(state), jax.lax.stop_gradient(params)
    steps, values = call_with_auto_axes(write_record, inner, params, ring.steps, ring.values)
    return RecordState(state.inner_state, Ring(steps, values, ring.names))


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The records of `record`, oldest first, as NumPy arrays. Compared by identity.

    ``total`` and each of ``leaves`` map the field names of `Measures` to arrays with one value for each of ``steps``;
    ``step_quantiles`` has a row of five.
    """

    steps: np.ndarray
    total: dict[str, np.ndarray]
    leaves: dict[str, dict[str, np.ndarray]]

    def frame(self) -> Any:
        """A `pandas.DataFrame` indexed by step and parameter, including ``"total"``; needs pandas."""
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "frame needs pandas: pip install pandas. Without pandas, use steps, total and leaves."
            ) from None
        columns = [*SCALARS, *(f"step_{100 * q:.0f}%" for q in QUANTILES)]
        frames = {}
        for name, x in {"total": self.total, **self.leaves}.items():
            values = np.column_stack([*(x[key] for key in SCALARS), x["step_quantiles"]])
            frames[name] = pandas.DataFrame(values, pandas.Index(self.steps, name="step"), columns)
        return pandas.concat(frames, names=["parameter"]).swaplevel().sort_index(level="step", sort_remaining=False)

    def __repr__(self):
        span = f", steps {self.steps[0]} to {self.steps[-1]}" if len(self.steps) else ""
        return f"History({len(self.steps)} records of {len(self.leaves)} parameters{span})"

    def _repr_html_(self):
        """The last record as a table, for notebooks."""
        if not len(self.steps):
            return html_table([("parameter",)], [repr(self)])
        measures = {"total": self.total, **self.leaves}
        last = {name: Measures(*(x[key][-1] for key in Measures._fields)) for name, x in measures.items()}
        return html_table(to_rows(last), [f"Last record of {self!r}"])


def history(state: optax.OptState) -> History:
    """Read the records of `record` from anywhere in ``state``.

    Args:
        state: the state of a transformation that contains one `record`.

    Returns:
        A `History`, oldest record first: ``steps``, ``total`` and ``leaves`` are NumPy arrays; ``frame()`` is a pandas
        frame where pandas is installed; `plot` draws it.

    Raises:
        ValueError: ``state`` has no `RecordState`, or several, or a batched one from `jax.vmap`; or its arrays were
            donated or deleted.
        TypeError: it was called within `jax.jit`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=1)
        >>> params = jnp.ones(2)
        >>> _, state = jadam.step(tx, jnp.ones(2), tx.init(params), params)
        >>> history = jadam.history(state)
        >>> print(history, history.total["snr"].round(3))
        History(1 records of 1 parameters, steps 1 to 1) [1.]
    """
    checks.check_not_transformation(state)
    found = find_states(state, RecordState)
    if len(found) != 1:
        raise ValueError(
            f"No recorded statistics in this state: {checks.short_repr(state)}. Wrap the optimizer: jadam.record(tx). "
            "With Flax NNX pass optimizer.opt_state; restore a checkpoint into the state that init returns."
            if not found
            else f"state must have one RecordState, found {len(found)}. Pass one of them."
        )
    ring = found[0].ring
    checks.check_values(ring, "state.ring")
    if any(isinstance(x, jax.core.Tracer) for x in ring):
        raise TypeError("state must have concrete values, got tracers. Call history outside of jax.jit.")
    if jnp.ndim(ring.steps) != 1:
        raise ValueError(
            f"state must not be batched, got steps of shape {ring.steps.shape}, as from jax.vmap. For the first one: "
            "history(jax.tree.map(lambda x: x[0], state))."
        )
    steps, values, names = map(np.asarray, ring)
    order = np.argsort(steps)[np.sum(steps < 0) :]  # without empty slots
    steps, values = steps[order], values[order]

    def columns(x):
        """Return a dict from the names of `Measures` to values, of an array ``[records, 11]``."""
        return {**{name: x[:, i] for i, name in enumerate(SCALARS)}, "step_quantiles": x[:, len(SCALARS) :]}

    total, *leaves = (columns(values[:, i]) for i in range(values.shape[1]))
    return History(steps, total, dict(zip(names.tobytes().decode().split("\n")[1:], leaves, strict=True)))


def plot(history: History) -> matplotlib.figure.Figure:
    """Plot a `History`: step sizes, signal-to-noise ratio, and each parameter's update-to-parameter ratio.

    A dotted line marks the first record with an update that is not finite. Values that are not finite are not drawn.
    Where a quantile is 0, its band starts at the smallest positive one.

    Args:
        history: the result of `history`, with at least one record.

    Returns:
        A `matplotlib.figure.Figure`; needs matplotlib. A notebook shows it as the last expression of a cell, or by
        ``display(figure)``.

    Raises:
        ValueError: there are no records, or no trained parameters.
        TypeError: ``history`` is not a `History`.
        ImportError: matplotlib is not installed.

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
        raise TypeError(f"plot needs the result of jadam.history(state), got {type(history).__name__}.")
    if not len(history.steps):
        raise ValueError("plot needs a history with at least one record, got none. Train for at least `every` steps.")
    if not history.leaves:
        raise ValueError("plot needs a history with at least one trained parameter, got none.")
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib.") from None

    class NotebookFigure(Figure):
        """A figure that notebooks display even without ``%matplotlib inline``."""

        def _repr_png_(self):
            self.savefig(png := io.BytesIO(), format="png")
            return png.getvalue()

    plain = FuncFormatter(lambda x, _: f"{x:g}")  # powers of ten need mathtext, which warns in old versions
    minor = lambda x: plain if x.size and np.nanmax(x) < 10 * np.nanmin(x) else NullFormatter()  # less than a decade
    names = list(history.leaves)
    figure = NotebookFigure(figsize=(9, 6 + 0.16 * min(len(names), 40)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1 + 0.05 * min(len(names), 40)])
    grid = top.get_gridspec()
    top.remove()
    sizes, snr = (figure.add_subplot(cell) for cell in grid[0].subgridspec(1, 2))
    blue, orange = "#0072b2", "#d55e00"  # Okabe & Ito's colour-blind-safe palette
    quantiles = history.total["step_quantiles"].T
    quantiles = np.where((quantiles > 0) & np.isfinite(quantiles), quantiles, np.nan)  # a log scale has no 0
    any_finite = np.isfinite(quantiles[2:]).any()
    for low, high in ((0, 4), (1, 3)) if any_finite else ():
        no_low = np.isfinite(quantiles[high]) & np.isnan(quantiles[low])
        quantiles[low, no_low] = np.nanmin(quantiles)
    marker = lambda x: "o" if np.isfinite(x).sum() == 1 else None  # a line of one point is invisible
    sizes.fill_between(history.steps, quantiles[0], quantiles[4], color=blue, alpha=0.2, lw=0, label="5 to 95 %")
    sizes.fill_between(history.steps, quantiles[1], quantiles[3], color=blue, alpha=0.4, lw=0, label="25 to 75 %")
    sizes.plot(history.steps, quantiles[2], color=blue, marker=marker(quantiles[2]), label="median")
    sizes.set(
        xlabel="step", ylabel="|update| per coordinate\n(parameters' unit)", title="step sizes (quantiles within 25 %)"
    )
    if any_finite:
        sizes.set_yscale("log")
        sizes.yaxis.set_major_formatter(plain)
        sizes.yaxis.set_minor_formatter(minor(quantiles))
    not_finite = history.steps[~np.isfinite(history.total["update_rms"])]
    for axes in (sizes, snr):
        axes.margins(x=0.03)
        axes.update_datalim([(step, 1) for step in history.steps[[0, -1]]], updatey=False)
        if len(not_finite):
            axes.axvline(not_finite[0], color="0.3", ls=":", label="not finite" if axes is sizes else None)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "frameon": False, "fontsize": "small"}
    sizes.legend(**below, ncols=3)
    for name in names:
        snr.plot(history.steps, history.leaves[name]["snr"], color="0.7", lw=0.7)
    total = history.total["snr"]
    snr.plot(history.steps, total, color=orange, marker=marker(total), label="all parameters")
    snr.plot([], [], color="0.7", lw=0.7, label="each parameter")
    snr.set(xlabel="step", ylabel="mean |m̂| / √v̂ (no unit)", title="signal-to-noise ratio")
    snr.set_ylim(0, 1.05 * snr.get_ylim()[1])
    snr.legend(**below, ncols=2)
    ratio = np.array([history.leaves[name]["update_ratio"] for name in names]).reshape(len(names), len(history.steps))
    ratio = np.ma.masked_where(~(np.isfinite(ratio) & (ratio > 0)), ratio)
    image = bottom.pcolormesh(
        np.arange(len(history.steps) + 1),
        np.arange(len(names) + 1),
        ratio,
        cmap="cividis",
        norm=LogNorm() if ratio.count() else None,
    )
    ticks = np.unique(np.linspace(0, len(history.steps) - 1, 8).astype(int))
    bottom.set_xticks(ticks + 0.5, history.steps[ticks])
    stride = -(-len(names) // 40)
    shown, families = _drawable(names[::stride])
    style = {"fontsize": "small", "fontfamily": families, "parse_math": False}
    bottom.set_yticks(np.arange(0, len(names), stride) + 0.5, shown, **style)
    bottom.invert_yaxis()
    bottom.set(xlabel="step", title="update-to-parameter ratio (RMS)")
    bar = figure.colorbar(image, ax=bottom, label="ratio (no unit)", format=plain)
    bar.ax.yaxis.set_minor_formatter(minor(ratio.compressed()))
    return figure


def _drawable(names: list[str]) -> tuple[list[str], list[str]]:
    """The ends of the names, and font families that have their characters.

    A character that no installed font has is escaped.
    """
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    characters = lambda path: set(map(chr, FT2Font(path).get_charmap()))
    families = list(rcParams["font.family"])
    missing = set("".join(names)) - characters(font_manager.findfont(font_manager.FontProperties(family=families)))
    for font in font_manager.fontManager.ttflist if missing else ():
        if "Last Resort" not in font.name and (found := missing & characters(font.fname)):  # that one draws boxes
            families.append(font.name)
            missing -= found
    escapes = {ord(x): x.encode("ascii", "backslashreplace").decode() for x in missing}
    names = [name.translate(escapes) for name in names]
    return [name if len(name) <= MAX_LABEL else f"…{name[1 - MAX_LABEL :]}" for name in names], families
