"""The memory that an optimizer's state takes for each parameter, and the reason for its format."""

from __future__ import annotations

import dataclasses
import html
import inspect
import math
import re
import unicodedata
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.meshes import find_meshes
from jadam._core.trees import find_states, leaf_names, match_state_to_params, params_tree, state_tree
from jadam._fused import partitioning
from jadam._fused.backends import FUSED_BY_XLA, Backend, backends, platform_of
from jadam._fused.step import why_leaves_not_fused, why_not_fused
from jadam._moments.formats import FORMATS
from jadam._transformation.transformation import QuantizedAdamState, update_of
from jadam._wrappers.exact_bf16 import ExactBF16State
from jadam.sharding import Sharded, sharded


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter: name, shape, dtype, format of its moments, bytes of its state, and the reason for the format.

    ``format`` is "none" if the parameter has no moments, as under `optax.masked`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    format: str
    bytes: int
    reason: str

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class Description:
    """Result of `describe`: a ``Leaf`` for each parameter, and ``other_bytes`` of the rest, such as step counters.

    ``one_pass``: whether `jadam.step` is fused, one pass over memory, on the default backend; None if only a state was
    given. ``step``: the same in words, with the reason if it is not fused.
    """

    leaves: tuple[Leaf, ...]
    other_bytes: int
    one_pass: bool | None
    step: str

    @property
    def bytes(self) -> int:
        """Total size of the state, in bytes."""
        return self.other_bytes + sum(leaf.bytes for leaf in self.leaves)

    @property
    def bytes_per_parameter(self) -> float:
        """Total size of the state divided by the number of parameters; NaN if there are none."""
        size = sum(leaf.size for leaf in self.leaves)
        return self.bytes / size if size else math.nan

    def __str__(self):
        return f"{table(self._rows())}\nstep: {self.step}"

    def _repr_html_(self):
        """The table, for notebooks."""
        return html_table(self._rows(), [f"step: {self.step}"])

    def _rows(self):
        """The cells of the table, titles first."""
        rows = [("parameter", "shape", "dtype", "moments", "bytes", "bytes/param", "reason")]
        for leaf in self.leaves:
            per_param = f"{leaf.bytes / leaf.size:.2f}" if leaf.size else "-"
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            rows.append(
                (leaf.name or "params", shape, str(leaf.dtype), leaf.format, f"{leaf.bytes:,}", per_param, leaf.reason)
            )
        if self.other_bytes > 100:  # more than step counters
            rows.append(("step counters and recorded statistics", "", "", "", f"{self.other_bytes:,}", "", ""))
        per_param = f"{self.bytes_per_parameter:.2f}" if any(leaf.size for leaf in self.leaves) else "-"
        rows.append(("total", "", "", "", f"{self.bytes:,}", per_param, ""))
        return rows


def table(rows) -> str:
    """Format rows of text as aligned columns, numbers to the right; the first row is the header."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    numbers = list(map(_is_number_column, columns))

    def cell(text, width, is_number):
        """``text`` with spaces up to ``width``."""
        spaces = " " * (width - _width(text))
        return spaces + text if is_number else text + spaces

    return "\n".join("  ".join(map(cell, row, widths, numbers)).rstrip() for row in rows)


def _width(text: str) -> int:
    """The number of terminal columns of ``text``: 2 for a wide character, 0 for a combining one."""
    is_wide = lambda c: unicodedata.east_asian_width(c) in "WF"
    is_combining = lambda c: unicodedata.category(c) in ("Mn", "Me", "Cf")
    return sum(0 if is_combining(c) else 1 + is_wide(c) for c in text)


def html_table(rows, notes=()) -> str:
    """Format the rows as an HTML table, for notebooks, with ``notes`` as lines below."""
    cell = lambda tag, x, align: f'<{tag} style="padding: 2px 5px; text-align: {align}">{html.escape(x)}</{tag}>'
    aligns = ["left" if not _is_number_column(column) else "right" for column in zip(*rows, strict=True)]
    line = lambda tag, row: "<tr>" + "".join(map(cell, [tag] * len(row), row, aligns)) + "</tr>"
    head, *body = rows
    lines = [line("th", head), *(line("td", row) for row in body)]
    return f"<table>{''.join(lines)}</table>" + "".join(f"<div>{html.escape(note)}</div>" for note in notes)


def _is_number_column(column) -> bool:
    """Whether all cells below the title are numbers or empty."""
    return any(column[1:]) and all(re.fullmatch(r"[\d.,e+-]*|nan|-?inf", x) for x in column[1:])


def describe(state_or_tx: optax.OptState | optax.GradientTransformation, params: optax.Params) -> Description:
    """Describe how each parameter's moments are stored: format, bytes, and the reason for the format.

    Args:
        state_or_tx: an optimizer's state, or Flax's ``Optimizer`` or ``TrainState``; or a transformation, whose
            ``init`` is traced, not run.
        params: the parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`), or an NNX module.

    Returns:
        A `Description`; print it for a table. Its ``leaves`` have ``name, shape, dtype, format, bytes, reason``. The
        totals are ``bytes`` and ``bytes_per_parameter``. ``one_pass`` and ``step`` say whether `jadam.step` is fused.
        A parameter's bytes include all arrays at its path in the state: moments, scales, remainders, accumulated
        gradients.

    Raises:
        TypeError: a parameter is not floating, or ``state_or_tx`` is neither a state nor a transformation.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"kernel": jnp.zeros((512, 512)), "bias": jnp.zeros(512)}
        >>> print(jadam.describe(jadam.adam(1e-3, moments="int8").init(params), params))
        parameter   shape    dtype    moments    bytes  bytes/param  reason
        ['bias']    512      float32  float32    4,098         8.00  1-dimensional, int8 needs 2 dimensions
        ['kernel']  512x512  float32  int8     540,672         2.06
        total                                  544,776         2.07
        step: pass tx instead of state to see whether the step is fused
    """
    if params is None or hasattr(params, "init"):
        raise TypeError(
            f"params must be a tree of parameters, got {checks.short_repr(params)}. Argument order: tx, params."
        )
    params = params_tree(params)
    if state_or_tx is None:
        raise TypeError("state_or_tx must be a transformation or its state, got None.")
    if inspect.isfunction(state_or_tx):
        raise TypeError(
            f"state_or_tx must be a transformation or its state, got {state_or_tx}. Call it: jadam.adam(1e-3)."
        )
    if not hasattr(state_or_tx, "init"):
        checks.check_arrays(params, "params")
        return _describe(None, state_tree(state_or_tx), params)
    tx = cast(optax.GradientTransformation, state_or_tx)
    trainable = update_of(tx).without_untrainable(params, params)
    checks.check_arrays(trainable, "params")
    shardings_known, advice = True, ""
    if not isinstance(tx, Sharded) and len(meshes := find_meshes(trainable)) == 1 and meshes[0].size > 1:
        shardings_known = meshes[0].are_all_axes_explicit or platform_of(jax.devices()[0]) in partitioning.PLATFORMS
        init = tx.init
        tx = sharded(tx, trainable, meshes[0])
        if [x.shape for x in jax.tree.leaves(jax.eval_shape(init, trainable))] != [
            x.shape for x in jax.tree.leaves(tx.abstract_state)
        ]:
            advice = "; call tx.init outside of jit, or use jadam.sharding.sharded, so that int8 blocks fit the shards"
    found = []
    # Inside the trace, where the state's leaves are tracers: a user's pytree classes may not accept ShapeDtypeStructs.
    jax.eval_shape(lambda traced: found.append(_describe(tx, tx.init(traced), trainable, shardings_known)), trainable)
    described = iter(found[0].leaves)
    frozen = lambda name, p: Leaf(name, jnp.shape(p), checks.dtype_of(p), "none", 0, "jadam.FROZEN")
    leaves, structure = jax.tree.flatten(params)
    rows = zip(leaf_names(params), leaves, structure.flatten_up_to(trainable), strict=True)
    leaves = [frozen(name, p) if x is None else next(described) for name, p, x in rows if checks.is_array(p)]
    return dataclasses.replace(found[0], leaves=tuple(leaves), step=found[0].step + advice)


def _describe(tx, state, params, shardings_known=True) -> Description:
    """Describe ``state``; ``tx`` is None if only the state is known.

    ``shardings_known``: whether `jadam.step` knows the shardings of parameters on a mesh.
    """
    checks.check_arrays(state, "state_or_tx")
    named = list(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
    moments: dict[str, list] = {name: [] for name, _ in named}
    nbytes = dict.fromkeys(moments, 0)
    other_bytes = 0
    for (name, field), x in zip(match_state_to_params(state, params), jax.tree.leaves(state), strict=True):
        if name is None:
            other_bytes += _nbytes(x)
        else:
            nbytes[name] += _nbytes(x)
            moments[name] += [x] if field in ("mu", "nu", "mu_scale", "nu_scale") else []
    quantized = bool(find_states(state, QuantizedAdamState))
    groups, one_pass, step = _describe_step(tx, state, params, [name for name, _ in named], shardings_known)
    exact = find_states(state, ExactBF16State)
    if exact and named and not any(x.dtype == jnp.int16 for x in jax.tree.leaves([x.remainder for x in exact])):
        step += "; exact_bf16 changes nothing, because no parameter is bfloat16"
    rows = zip(named, groups, strict=True)
    leaves = tuple(_describe_leaf(name, p, moments[name], nbytes[name], quantized, group) for (name, p), group in rows)
    return Description(leaves, other_bytes, one_pass, step)


def _describe_step(tx, state, params, names, shardings_known) -> tuple[list[Any], bool | None, str]:
    """Each leaf's rule of `jadam.by_path` or None, then ``one_pass`` and ``step`` of the `Description`."""
    no_groups = [None] * len(names)
    if tx is None:
        return no_groups, None, "pass tx instead of state to see whether the step is fused"
    shard_shapes = None
    if isinstance(tx, Sharded):
        shard_shapes = [leaf.state_sharding.shard_shape(leaf.shape) for leaf in tx.layout.leaves]
        tx = update_of(tx).inner
    if (reason := why_not_fused(tx, params, state, params)) is not None:
        return no_groups, False, f"not fused: {reason}"
    platform = platform_of(jax.devices()[0])
    backend = backends().get(platform, Backend(None, "no kernel"))
    found = why_leaves_not_fused(platform, tx, params, state, params, shard_shapes, shardings_known)
    groups, reasons = zip(*found, strict=True) if names else ((), ())
    if backend.kernel is None and platform not in FUSED_BY_XLA:
        return list(groups), False, f"not fused on {platform}: {backend.reason}"
    unfused = [f"{name} ({reason})" for name, reason in zip(names, reasons, strict=True) if reason is not None]
    exception = f", except {unfused[0]}" if unfused else ""
    more = f" and {len(unfused) - 1} more" if len(unfused) > 1 else ""
    return list(groups), not unfused, f"fused on {platform} ({backend.kernel or 'XLA'}){exception}{more}"


def _describe_leaf(name, p, moments, nbytes, quantized, group) -> Leaf:
    """Describe one parameter, from its moments as stored and the bytes of all its state."""
    format, reason = "none", "no moments in this state"
    if len(moments) > 1:
        format, reason = next(x for x in FORMATS.values() if x.matches(moments)).name, ""
        if format == "float32" and moments[0].dtype == jnp.bfloat16:
            reason = "mu_dtype"
        elif format == "bfloat16" and quantized:
            reason = "set by the moments argument"
        elif format != "int8" and quantized:
            reason = FORMATS["int8"].unsupported_reason(p) or "set by the moments argument"
        elif format == "float32" and jnp.finfo(moments[0].dtype).bits > 32:
            reason = f"stored as {moments[0].dtype}"
    if group is not None:
        reason = f"{group.name}: {reason}" if group.moments == "int8" and format == "float32" else group.name
    return Leaf(name, tuple(jnp.shape(p)), checks.dtype_of(p), format, nbytes, reason)


def _nbytes(x) -> int:
    """Bytes of an array or ShapeDtypeStruct."""
    return np.size(x) * jnp.result_type(x).itemsize
