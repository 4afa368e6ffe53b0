"""What of an optimizer's state belongs to which parameter, in how many bytes, and why so many."""

import dataclasses
import html
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.trees import find_states, leaf_name, match_state_to_params
from jadam._fused import pallas
from jadam._fused.backends import Backend, backends, platform_of
from jadam._fused.step import why_leaves_not_fused, why_not_fused
from jadam._moments.formats import FORMATS
from jadam._transformation.transformation import QuantizedAdamState


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: its name, shape and dtype, the format of its moments, all its state in bytes, and the reason.

    ``format`` is "none" where there are no moments, as behind `optax.masked`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    format: str
    bytes: int
    reason: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Description:
    """What `describe` returns: a `Leaf` for each parameter, and the bytes that belong to none, such as counts.

    ``one_pass`` says whether `jadam.step` takes one pass over memory on the default backend, None if only a state is
    known; ``step`` says it in words, with the reason if not.
    """

    leaves: tuple[Leaf, ...]
    other_bytes: int
    one_pass: bool | None
    step: str

    @property
    def bytes(self) -> int:
        """The whole state in bytes."""
        return self.other_bytes + sum(leaf.bytes for leaf in self.leaves)

    @property
    def bytes_per_parameter(self) -> float:
        """The whole state over the number of parameters."""
        return self.bytes / max(1, sum(leaf.size for leaf in self.leaves))

    def __str__(self):
        return f"{table(self._rows())}\nstep: {self.step}"

    def _repr_html_(self):
        """The table, for notebooks."""
        return html_table(self._rows(), [f"step: {self.step}"])

    def _rows(self):
        rows = [("parameter", "shape", "dtype", "moments", "bytes", "each", "why")]
        for leaf in self.leaves:
            each = f"{leaf.bytes / leaf.size:.2f}" if leaf.size else "-"
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            rows.append(
                (leaf.name or "params", shape, str(leaf.dtype), leaf.format, f"{leaf.bytes:,}", each, leaf.reason)
            )
        if self.other_bytes > 100:  # more than counts
            rows.append(("records, numbers of steps", "", "", "", f"{self.other_bytes:,}", "", ""))
        rows.append(("total", "", "", "", f"{self.bytes:,}", f"{self.bytes_per_parameter:.2f}", ""))
        return rows


def table(rows) -> str:
    """Rows of text, the first one the titles, in columns, those of numbers aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.rjust if _is_number_column(column) else str.ljust for column in zip(*rows, strict=True)]
    lines = ("  ".join(put(x, n) for put, x, n in zip(align, row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def html_table(rows, notes=()) -> str:
    """The same as HTML, for notebooks; ``notes`` are lines below."""
    cell = lambda tag, x, align: f'<{tag} style="text-align: {align}">{html.escape(x)}</{tag}>'
    aligns = ["left" if not _is_number_column(column) else "right" for column in zip(*rows, strict=True)]
    line = lambda tag, row: "<tr>" + "".join(map(cell, [tag] * len(row), row, aligns)) + "</tr>"
    head, *body = rows
    lines = [line("th", head), *(line("td", row) for row in body)]
    return f"<table>{''.join(lines)}</table>" + "".join(f"<div>{html.escape(note)}</div>" for note in notes)


def _is_number_column(column) -> bool:
    return any(column[1:]) and all(re.fullmatch(r"[\d.,e+-]*|nan|-?inf", x) for x in column[1:])


def describe(state_or_tx, params) -> Description:
    """Tell for every parameter how its moments are stored, in how many bytes, and why.

    Args:
        state_or_tx: an optimizer's state, or a transformation, whose ``init`` is then traced but not run.
        params: the parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`).

    Returns:
        A `Description`; print it for a table. Its ``leaves`` have ``name, shape, dtype, format, bytes, reason``, and
        it has ``bytes`` and ``bytes_per_parameter`` in total, ``one_pass`` and ``step``. Whatever lies in the state
        under a parameter's path counts as that parameter's: moments, scales, remainders, sums of gradients.

    Raises:
        TypeError: a parameter that is not floating, or ``state_or_tx`` that is neither.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"kernel": jnp.zeros((512, 512)), "bias": jnp.zeros(512)}
        >>> print(jadam.describe(jadam.adam(1e-3, moments="int8").init(params), params))
        parameter   shape    dtype    moments    bytes  each  why
        ['bias']    512      float32  float32    4,098  8.00  1-dimensional, int8 needs 2 axes
        ['kernel']  512x512  float32  int8     540,672  2.06
        total                                  544,775  2.07
        step: unknown, a state does not tell; describe the transformation
    """
    if params is None or hasattr(params, "init"):
        raise TypeError(
            f"params must be parameters, got {checks.short_repr(params)}. The order is describe(tx, params)."
        )
    checks.check_trainable(params, "params")
    if state_or_tx is None:
        raise TypeError("state_or_tx must be a transformation or its state, got None.")
    if not hasattr(state_or_tx, "init"):
        return _description(None, state_or_tx, params)
    found = []
    # Within the trace: a state of shapes alone would be taken for arrays by a user's own classes.
    jax.eval_shape(lambda traced: found.append(_description(state_or_tx, state_or_tx.init(traced), params)), params)
    return found[0]


def _description(tx, state, params) -> Description:
    checks.check_arrays(state, "state_or_tx")
    named = [(leaf_name(path), p) for path, p in jax.tree_util.tree_leaves_with_path(params)]
    moments: dict[str, list] = {name: [] for name, _ in named}
    sizes = dict.fromkeys(moments, 0)
    other = 0
    for (name, field), x in zip(match_state_to_params(state, params), jax.tree.leaves(state), strict=True):
        if name is None:
            other += _bytes(x)
        else:
            sizes[name] += _bytes(x)
            moments[name] += [x] if field in ("mu", "nu", "mu_scale", "nu_scale") else []
    quantized = bool(find_states(state, QuantizedAdamState))
    groups, one_pass, step = _fusion(tx, state, params, [name for name, _ in named])
    rows = zip(named, groups, strict=True)
    leaves = tuple(_leaf(name, p, moments[name], sizes[name], quantized, group) for (name, p), group in rows)
    return Description(leaves, other, one_pass, step)


def _fusion(tx, state, params, names) -> tuple[list[Any], bool | None, str]:
    """Each leaf's rule of `jadam.by_path`, if any; whether `jadam.step` is one pass here, and that in words."""
    unknown = [None] * len(names)
    if tx is None:
        return unknown, None, "unknown, a state does not tell; describe the transformation"
    reason = why_not_fused(tx, params, state, params)
    if reason is not None:
        return unknown, False, f"not fused: {reason}"
    platform = platform_of(jax.devices()[0])
    backend = backends().get(platform, Backend(None, "no kernel"))
    groups, refusals = (
        zip(*why_leaves_not_fused(platform, tx, params, state, params), strict=True) if names else ((), ())
    )
    if backend.kernel is None and platform not in pallas.PLATFORMS:
        return list(groups), False, f"not fused on {platform}: {backend.reason}"
    refused = [f"{name} ({reason})" for name, reason in zip(names, refusals, strict=True) if reason is not None]
    but = f", but for {refused[0]}" if refused else ""
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return list(groups), not refused, f"one pass on {platform} ({backend.kernel or 'XLA'}){but}{more}"


def _leaf(name, p, moments, size, quantized, group):
    format, reason = "none", "no moments in this state"
    if len(moments) > 1:
        format, reason = next(x for x in FORMATS.values() if x.matches(moments)).name, ""
        if format == "float32" and moments[0].dtype == jnp.bfloat16:
            reason = "mu_dtype"
        elif format == "bfloat16" and quantized:
            reason = "so chosen by moments"
        elif format != "int8" and quantized:
            reason = FORMATS["int8"].unsupported_reason(p) or "so chosen by moments"
        elif format == "float32" and jnp.finfo(moments[0].dtype).bits > 32:
            reason = f"of the parameter's own {moments[0].dtype}"
    if group is not None:
        reason = f"{group.name}: {reason}" if group.moments == "int8" and format == "float32" else group.name
    return Leaf(name, tuple(jnp.shape(p)), np.dtype(jnp.result_type(p)), format, size, reason)


def _bytes(x) -> int:
    return np.size(x) * jnp.result_type(x).itemsize
