"""The memory that training takes on each device of a mesh, computed from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh

from jadam._core import checks
from jadam._core.meshes import mesh_axes
from jadam._core.trees import leaf_names, match_state_to_params, params_tree, params_with_gradients
from jadam._diagnostics.describe import html_table, table
from jadam._diagnostics.models import MODELS
from jadam._optimizers.adam import adamw
from jadam._transformation.transformation import update_of
from jadam._wrappers.exact_bf16 import exact_bf16
from jadam.sharding import shard_largest_dim, zero1

UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
PARTS = ("parameters", "gradients", "moments", "remainders", "other")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, by kind; besides, the number of parameters in all and of devices."""

    num_parameters: int
    devices: int
    parameters: int
    gradients: int
    moments: int
    remainders: int
    other: int
    notes: dict[str, str]  # on parameters with state that is not sharded, or not in the requested format
    gathered: int = 0  # of `parameters`, those whose state is sharded further: `jadam.step` gathers them

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state on one device."""
        return self.moments + self.remainders + self.other

    @property
    def total(self) -> int:
        """Bytes on one device, without activations."""
        return self.parameters + self.gradients + self.state

    def __str__(self):
        head, notes = self._head_and_notes()
        return "\n".join([head, table(self._table()), *notes])

    def _repr_html_(self):
        """The table, for notebooks."""
        head, notes = self._head_and_notes()
        return html_table(self._table(), [head, *notes])

    def _table(self):
        """The cells of the table, titles first."""
        unit, size = unit_of(self.total)
        return [("", "bytes per device", unit), *((name, f"{x:,}", f"{x / size:.2f}") for name, x in self.rows())]

    def _head_and_notes(self) -> tuple[str, list[str]]:
        """The line above the table, and the lines below it."""
        notes = [f"{name}: {note}" for name, note in list(self.notes.items())[:5]]
        more = [f"and {len(self.notes) - 5} more"] if len(self.notes) > 5 else []
        return f"{self.num_parameters:,} parameters on {count_devices(self.devices)}", [*notes, *more]

    def rows(self) -> list[tuple[str, int]]:
        """The name and bytes of each kind, then of the total."""
        return [*((name, getattr(self, name)) for name in PARTS), ("total", self.total)]


def count_devices(n: int) -> str:
    """``1 device``, ``2 devices``."""
    return f"{n} device{'s' * (n > 1)}"


def unit_of(nbytes: int) -> tuple[str, int]:
    """The largest binary unit, name and bytes, that is not larger than ``nbytes``."""
    return next((x for x in UNITS.items() if x[1] <= nbytes), ("KiB", 2**10))


def plan(
    tx: optax.GradientTransformation,
    shapes: Any,
    mesh_shape: Mapping[str, int],
    axis: str | Sequence[str],
    params_axis: str | Sequence[str] | None = None,
) -> MemoryPlan:
    """Compute the memory that parameters, gradients and the optimizer's state take on each device of a mesh.

    Nothing is allocated, and the mesh need not exist. Parameters and gradients are replicated unless ``params_axis`` is
    given. The state is sharded by `jadam.sharding.zero1`. Activations are not counted. On the command line,
    ``jadam plan`` does this for well-known models.

    The bytes are those of the arrays. A TPU pads their last two dimensions to tiles, which adds less than 1 % to
    well-known models. `jadam.step` itself needs no temporaries where it takes one pass and the state is sharded as the
    parameters are, as on one device and with FSDP. If the state is sharded further, the step gathers the parameters.
    ``gathered`` is their size. The temporaries are up to 1.6 times as large on a TPU v5e, and twice on a CPU.

    Args:
        tx: any Optax transformation.
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`; gradients are assumed to have the parameters' dtypes.
        mesh_shape: the sizes of the mesh's axes, such as ``{"data": 4, "model": 64}``.
        axis: the mesh axis, or several, to shard the state over.
        params_axis: the mesh axis, or several, to shard parameters and gradients over: the data axis for FSDP, a model
            axis for tensor parallelism. Each parameter is sharded along its largest dimension that divides evenly.

    Returns:
        A `MemoryPlan` with ``num_parameters`` and the bytes of one device: ``parameters``,
        ``gradients``, ``moments``, ``remainders``, ``other``, ``state``, ``total``, ``gathered``. Print it for a table.

    Raises:
        ValueError, TypeError: the same as `jadam.sharding.zero1`.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((4096, 16384), jnp.bfloat16)}
        >>> tx = jadam.exact_bf16(jadam.adamw(1e-3, moments="int8"))
        >>> print(jadam.plan(tx, shapes, {"data": 256}, "data"))
        67,108,864 parameters on 256 devices
                    bytes per device     MiB
        parameters       134,217,728  128.00
        gradients        134,217,728  128.00
        moments              540,672    0.52
        remainders           524,288    0.50
        other                      7    0.00
        total            269,500,423  257.02
    """
    checks.check_transformation("plan needs", tx)
    mesh = _mesh(mesh_shape)
    shapes = params_tree(shapes)
    trainable = update_of(tx).without_untrainable(shapes, shapes)
    checks.check_trainable(trainable, "shapes")
    mesh_axes(axis, mesh)  # raises unless the mesh has them
    params = shard_largest_dim(shapes, mesh, params_axis)
    notes, gathered = {}, 0
    if mesh.size == 1:
        state = jax.eval_shape(tx.init, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), trainable))
    else:
        sharded = zero1(tx, params, mesh, axis)
        state = sharded.layout.state
        notes = {name: f"state not sharded: {reason}" for name, reason in sharded.undivided.items()}
        notes |= {name: f"moments in float32: {reason}" for name, reason in sharded.widened.items()}
        split = lambda x: x.state_sharding.shard_shape(x.shape) != x.param_sharding.shard_shape(x.shape)
        whole = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
        gathered = sum(_nbytes_per_device(whole[x.name]) for x in sharded.layout.leaves if split(x))
    sizes = dict.fromkeys(PARTS, 0)
    for (name, field), x in zip(match_state_to_params(state, params), jax.tree.leaves(state), strict=True):
        kind = "other" if name is None else "remainders" if field == "remainder" else "moments"
        sizes[kind] += _nbytes_per_device(x)
    sizes["parameters"] = sum(map(_nbytes_per_device, jax.tree.leaves(params)))
    sizes["gradients"] = sum(map(_nbytes_per_device, jax.tree.leaves(params_with_gradients(params, trainable)[0])))
    return MemoryPlan(
        sum(x.size for x in jax.tree.leaves(params)),
        math.prod(mesh_shape.values()),
        **sizes,
        notes=notes,
        gathered=gathered,
    )


def _mesh(shape) -> AbstractMesh:
    """Return an abstract mesh of these axis sizes; raise if they are invalid."""
    is_valid = isinstance(shape, Mapping) and all(isinstance(x, (int, np.integer)) and x > 0 for x in shape.values())
    if not is_valid or math.prod(shape.values()) >= 2**31:
        raise ValueError(
            "mesh_shape must be a dict from axis names to sizes > 0, with fewer than 2**31 devices, got "
            f"{checks.short_repr(shape)}."
        )
    return AbstractMesh(tuple(map(int, shape.values())), tuple(shape))


def _nbytes_per_device(x) -> int:
    """Bytes of one shard of an array."""
    return math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def shapes_of(model: str, dtype=jnp.bfloat16) -> Any:
    """Parameter shapes of a well-known model: ``"gpt2"``, ``"llama-7b"`` or ``"llama-70b"``."""
    checks.check_one_of("model", model, tuple(MODELS))
    if (dtype := checks.floating_dtype("dtype", dtype)) is None:
        raise TypeError("dtype must be a floating dtype such as jnp.bfloat16, got None.")
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), MODELS[model](), is_leaf=lambda x: isinstance(x, tuple)
    )


def cast_shapes(shapes: Any, dtype) -> Any:
    """``shapes`` with ``dtype`` for those that are floating."""
    cast = lambda x: jax.ShapeDtypeStruct(x.shape, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, shapes)


CONFIGURATIONS = {
    "float32": (jnp.float32, adamw(1e-3)),
    "bfloat16": (jnp.float32, adamw(1e-3, moments="bfloat16")),
    "int8": (jnp.float32, adamw(1e-3, moments="int8")),
    "bfloat16 + exact_bf16": (jnp.bfloat16, exact_bf16(adamw(1e-3, moments="bfloat16"))),
    "int8 + exact_bf16": (jnp.bfloat16, exact_bf16(adamw(1e-3, moments="int8"))),
}


def draw(plans: Mapping[str, MemoryPlan], title: str) -> Any:
    """Plot a stacked bar of memory per device for each plan, as a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(plans)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(plans))
    unit, size = unit_of(max(x.total for x in plans.values()))
    colors = ("#0072b2", "#56b4e9", "#d55e00", "#f0e442")  # Okabe & Ito's colour-blind-safe palette
    for part, color in zip(PARTS, colors, strict=False):
        width = np.array([getattr(x, part) / size for x in plans.values()])
        axes.barh(list(plans), width, left=left, label=part, color=color)
        left += width
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * left.max())
    axes.set(xlabel=f"{unit} per device", title=title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.12), ncols=len(colors), frameon=False)
    return figure
