"""Plot the records of `jadam.record`. Matplotlib is imported when a plot is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from jadam._core import checks
from jadam._diagnostics.record import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

MAX_ROWS = 40  # parameters with a label on the map
MAX_LABEL = 40  # characters of a parameter's name
MAX_LINES, MAX_LINE_LABEL = 6, 20  # so many parameters, with names of so many characters, fit into a legend
BLUE, ORANGE = "#0072b2", "#d55e00"  # Okabe & Ito's colour-blind-safe palette
LINE_COLORS = ("#56b4e9", "#009e73", "#cc79a7", "#e69f00", BLUE, "0.4")


def plot(
    history: History,
    figure: Figure | SubFigure | None = None,
    *,
    axes: Sequence[Axes] | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> Figure | SubFigure:
    """Plot a `History`: step sizes, signal-to-noise ratio, and each parameter's update-to-parameter ratio.

    A dotted line marks the first record with an update that is not finite. Values that are not finite are not drawn.
    Where a quantile is 0, its band starts at the smallest positive one.

    Call it again with the same figure to update a plot while training. In a notebook::

        figure = jadam.plot(jadam.history(state))
        shown = display(figure, display_id=True)
        ...  # train on
        shown.update(jadam.plot(jadam.history(state), figure))

    Args:
        history: the result of `history`, with at least one record.
        figure: the matplotlib ``Figure`` or ``SubFigure`` to draw in. It is cleared first. It should measure 9 by 7
            inches or more, and the figure of a subfigure needs ``layout="constrained"``. None makes a new figure.
        axes: three matplotlib ``Axes`` to draw in instead, for the step sizes, the signal-to-noise ratio and the map of
            ratios. They are cleared first.
        learning_rate: the number or schedule that the optimizer got. If given, the map shows the ratio divided by the
            learning rate of its step, so that a schedule does not hide the differences between parameters.

    Returns:
        The figure; needs matplotlib. A notebook shows a new one as the last expression of a cell, or by
        ``display(figure)``.

    Raises:
        ValueError: there are no records, or no trained parameters; both ``figure`` and ``axes`` are given; or
            ``learning_rate`` is not positive.
        TypeError: ``history`` is not a `History`, or another argument has a wrong type.
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> tx = jadam.record(jadam.adam(0.1), every=1)
        >>> params = jnp.ones(2)
        >>> _, state = jadam.step(tx, jnp.ones(2), tx.init(params), params)
        >>> figure = jadam.plot(jadam.history(state))
        >>> print([axes.get_xlabel() for axes in figure.axes])
        ['step', 'step', 'step']
        >>> jadam.plot(jadam.history(state), figure) is figure
        True
    """
    if not isinstance(history, History):
        raise TypeError(f"plot needs the result of jadam.history(state), got {type(history).__name__}.")
    if not len(history.steps):
        raise ValueError("plot needs a history with at least one record, got none. Train for at least `every` steps.")
    if not history.leaves:
        raise ValueError("plot needs a history with at least one trained parameter, got none.")
    if learning_rate is not None:
        learning_rate = checks.hyperparameter("learning_rate", learning_rate, "> 0")
    try:
        from matplotlib.figure import FigureBase
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install matplotlib.") from None
    if axes is None:
        if figure is None:
            figure = _new_figure(len(history.leaves))
        elif not isinstance(figure, FigureBase):
            raise TypeError(
                f"figure must be a matplotlib Figure or SubFigure, got {type(figure).__name__}. To draw in axes of "
                "your own, pass three of them as axes."
            )
        axes = _new_axes(figure, len(history.leaves))
    elif figure is not None:
        raise ValueError("figure or axes must be None, got both. Pass the one to draw in.")
    sizes, snr, ratios = axes = _checked_axes(axes)
    for each in axes:
        each.clear()
    _draw_step_sizes(sizes, history)
    _draw_snr(snr, history)
    _draw_ratios(ratios, history, learning_rate)
    return sizes.figure if figure is None else figure


def _new_figure(num_params: int) -> Figure:
    """An empty figure, high enough for a map of so many parameters."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """A figure that notebooks display even without ``%matplotlib inline``."""

        def _repr_png_(self):
            self.savefig(png := io.BytesIO(), format="png")
            return png.getvalue()

    return NotebookFigure(figsize=(9, 6.5 + 0.16 * min(num_params, MAX_ROWS)))


def _new_axes(figure, num_params: int) -> list[Axes]:
    """Clear the figure and add the three axes."""
    figure.clear()
    if figure.get_layout_engine() is None and hasattr(figure, "set_layout_engine"):  # a subfigure has its figure's
        figure.set_layout_engine("constrained")
    mosaic: Any = [[[["sizes", "snr"]]], ["ratios"]]
    axes = figure.subplot_mosaic(mosaic, height_ratios=[1, 0.8 + 0.05 * min(num_params, MAX_ROWS)])
    return [axes[name] for name in ("sizes", "snr", "ratios")]


def _checked_axes(axes) -> list[Axes]:
    """``axes`` as a list; raises unless these are three."""
    from matplotlib.axes import Axes

    found = np.ravel(np.asarray(axes, object)).tolist()
    if len(found) != 3 or not all(isinstance(x, Axes) for x in found):
        raise TypeError(
            "axes must be three matplotlib Axes, for step sizes, signal-to-noise ratio and map, got "
            f"{', '.join(type(x).__name__ for x in found) or 'none'}."
        )
    return found


def _draw_step_sizes(axes: Axes, history: History):
    """The quantiles of all coordinates' step sizes."""
    quantiles = history.total["step_quantiles"].T
    quantiles = np.where((quantiles > 0) & np.isfinite(quantiles), quantiles, np.nan)  # a log scale has no 0
    any_finite = np.isfinite(quantiles[2:]).any()
    for low, high in ((0, 4), (1, 3)) if any_finite else ():
        no_low = np.isfinite(quantiles[high]) & np.isnan(quantiles[low])
        quantiles[low, no_low] = np.nanmin(quantiles)
    axes.fill_between(history.steps, quantiles[0], quantiles[4], color=BLUE, alpha=0.2, lw=0, label="5 to 95 %")
    axes.fill_between(history.steps, quantiles[1], quantiles[3], color=BLUE, alpha=0.4, lw=0, label="25 to 75 %")
    axes.plot(history.steps, quantiles[2], color=BLUE, marker=_marker(quantiles[2]), label="median")
    axes.set(
        xlabel="step", ylabel="|update| per coordinate\n(parameters' unit)", title="step sizes (quantiles within 25 %)"
    )
    if any_finite:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain())
        axes.yaxis.set_minor_formatter(_minor(quantiles))
    _mark_steps(axes, history, "not finite")
    _legend_below(axes, ncols=3)


def _draw_snr(axes: Axes, history: History):
    """The signal-to-noise ratio, in total and a line for each parameter. A few parameters have their names beside."""
    names = list(history.leaves)
    named = 1 < len(names) <= MAX_LINES and max(map(len, names)) <= MAX_LINE_LABEL
    shown, families = _drawable(names if named else [])
    for i, name in enumerate(names):
        style = {"color": LINE_COLORS[i], "lw": 1.2, "label": shown[i]} if named else {"color": "0.7", "lw": 0.7}
        axes.plot(history.steps, history.leaves[name]["snr"], **style)
    total = history.total["snr"]
    axes.plot(history.steps, total, color=ORANGE, lw=2, marker=_marker(total), label="all parameters")
    if not named:
        axes.plot([], [], color="0.7", lw=0.7, label="each parameter")
    axes.set(xlabel="step", ylabel="mean |m̂| / √v̂ (no unit)", title="signal-to-noise ratio")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    _mark_steps(axes, history)
    for text in _legend_below(axes, ncols=2).get_texts():
        text.set(parse_math=False, fontfamily=families)


def _draw_ratios(axes: Axes, history: History, learning_rate):
    """A map of the update-to-parameter ratios, with a row for each parameter, and its colour bar."""
    from matplotlib.colors import LogNorm

    names, steps = list(history.leaves), history.steps
    ratio = np.array([history.leaves[name]["update_ratio"] for name in names]).reshape(len(names), len(steps))
    if learning_rate is not None:
        with np.errstate(divide="ignore", invalid="ignore"):  # a schedule may be 0
            ratio = ratio / _learning_rates(learning_rate, steps)
    ratio = np.ma.masked_where(~(np.isfinite(ratio) & (ratio > 0)), ratio)
    norm = LogNorm() if ratio.count() else None
    image = axes.pcolormesh(np.arange(len(steps) + 1), np.arange(len(names) + 1), ratio, cmap="cividis", norm=norm)
    ticks = np.unique(np.linspace(0, len(steps) - 1, 8).astype(int))
    axes.set_xticks(ticks + 0.5, steps[ticks])
    stride = -(-len(names) // MAX_ROWS)
    shown, families = _drawable(names[::stride])
    style = {"fontsize": "small", "fontfamily": families, "parse_math": False}
    axes.set_yticks(np.arange(0, len(names), stride) + 0.5, shown, **style)
    axes.invert_yaxis()
    divided = "" if learning_rate is None else " / learning rate"
    axes.set(xlabel="step", title=f"update-to-parameter ratio (RMS){divided}")
    # Inset axes, as they go when `axes` are cleared.
    bar = axes.figure.colorbar(
        image, cax=axes.inset_axes((1.02, 0, 0.025, 1)), label=f"ratio{divided} (no unit)", format=_plain()
    )
    bar.ax.yaxis.set_minor_formatter(_minor(ratio.compressed()))


def _learning_rates(learning_rate, steps: np.ndarray) -> np.ndarray:
    """The learning rate of each step. The first step has that of count 0, as in Optax."""
    if not callable(learning_rate):
        return np.asarray(learning_rate, np.float32)
    rate = jax.jit(learning_rate)
    return np.array([rate(np.int32(step - 1)) for step in steps], np.float32)


def _mark_steps(axes: Axes, history: History, label: str | None = None):
    """Show the steps of all records, and a dotted line at the first with an update that is not finite."""
    axes.margins(x=0.03)
    axes.update_datalim([(step, 1) for step in history.steps[[0, -1]]], updatey=False)
    not_finite = history.steps[~np.isfinite(history.total["update_rms"])]
    if len(not_finite):
        axes.axvline(not_finite[0], color="0.3", ls=":", label=label)


def _legend_below(axes: Axes, ncols: int):
    """A legend below the label of the x axis, whatever the height of the axes."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -0.45, axes.figure.dpi_scale_trans)  # inches
    return axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        borderaxespad=0,
        frameon=False,
        fontsize="small",
        ncols=ncols,
    )


def _marker(x):
    """A line of one point is invisible, and needs a marker."""
    return "o" if np.isfinite(x).sum() == 1 else None


def _plain():
    """Numbers without powers of ten, which need mathtext and warn in old versions."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x:g}")


def _minor(x):
    """Labels of minor ticks: all for less than a decade of values, 2 and 5 for less than two."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    decades = np.log10(np.nanmax(x) / np.nanmin(x)) if x.size else np.inf
    if decades < 1:
        return _plain()
    return FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "") if decades < 2 else NullFormatter()


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
