"""How much memory training takes on every device, before there is any."""

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
from jadam._core.trees import match_state_to_params
from jadam._diagnostics.describe import html_table, table
from jadam._diagnostics.models import MODELS
from jadam._optimizers.adam import adamw
from jadam._wrappers.exact_bf16 import exact_bf16
from jadam.sharding import shard_largest_dim, zero1

GIB = 2**30
PARTS = ("parameters", "gradients", "moments", "remainders", "other")


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device, of each kind; ``count`` is the number of parameters in all."""

    count: int
    devices: int
    parameters: int
    gradients: int
    moments: int
    remainders: int
    other: int
    notes: dict[str, str]  # of parameters whose state is undivided or not in the format asked for

    @property
    def state(self) -> int:
        """The optimizer's state on one device."""
        return self.moments + self.remainders + self.other

    @property
    def total(self) -> int:
        """All that a step needs on one device, but for activations."""
        return self.parameters + self.gradients + self.state

    def __str__(self):
        head, notes = self._text()
        return "\n".join([head, table(self._table()), *notes])

    def _repr_html_(self):
        """The table, for notebooks."""
        head, notes = self._text()
        return html_table(self._table(), [head, *notes])

    def _table(self):
        return [("", "bytes on a device", "GiB"), *((name, f"{x:,}", f"{x / GIB:.2f}") for name, x in self.rows())]

    def _text(self):
        notes = [f"{name}: {note}" for name, note in list(self.notes.items())[:5]]
        more = [f"and {len(self.notes) - 5} more"] if len(self.notes) > 5 else []
        return f"{self.count:,} parameters on {self.devices} devices", [*notes, *more]

    def rows(self) -> list[tuple[str, int]]:
        """Each kind and the total."""
        return [*((name, getattr(self, name)) for name in PARTS), ("total", self.total)]


def plan(
    tx: optax.GradientTransformation,
    shapes: Any,
    mesh_shape: Mapping[str, int],
    axis: str | Sequence[str],
    params_axis: str | Sequence[str] | None = None,
) -> MemoryPlan:
    """Tell how many bytes parameters, gradients and the optimizer's state take on each device of a mesh.

    Nothing is allocated, and the mesh need not exist; ``jadam plan`` on the command line does it for known models.
    Parameters and gradients are whole on every device but for ``params_axis``; the state is divided by
    `jadam.sharding.zero1`. Activations are not counted.

    Args:
        tx: any Optax transformation.
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`; gradients count as of the parameters' dtypes.
        mesh_shape: the sizes of the mesh's axes, such as ``{"data": 4, "model": 64}``.
        axis: the axis to divide the state over, or several.
        params_axis: the axis over which the parameters are divided, each along its largest dimension that divides, as
            in tensor parallelism; or several axes.

    Returns:
        A `MemoryPlan` with ``count``, the number of parameters, and the bytes of one device: ``parameters``,
        ``gradients``, ``moments``, ``remainders``, ``other``, ``state``, ``total``. Print it for a table.

    Raises:
        ValueError, TypeError: as `jadam.sharding.zero1` raises.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> shapes = {"kernel": jax.ShapeDtypeStruct((4096, 16384), jnp.bfloat16)}
        >>> tx = jadam.exact_bf16(jadam.adamw(1e-3, moments="int8"))
        >>> print(jadam.plan(tx, shapes, {"data": 256}, "data"))
        67,108,864 parameters on 256 devices
                    bytes on a device   GiB
        parameters        134,217,728  0.12
        gradients         134,217,728  0.12
        moments               540,672  0.00
        remainders            524,288  0.00
        other                       6  0.00
        total             269,500,422  0.25
    """
    checks.check_transformation("plan needs", tx)
    mesh = _mesh(mesh_shape)
    checks.check_trainable(shapes, "shapes")
    params = shard_largest_dim(shapes, mesh, params_axis)
    divided = zero1(tx, params, mesh, axis)
    state = divided.layout.state
    sizes = dict.fromkeys(PARTS, 0)
    for (name, field), x in zip(match_state_to_params(state, params), jax.tree.leaves(state), strict=True):
        kind = "other" if name is None else "remainders" if field == "remainder" else "moments"
        sizes[kind] += _here(x)
    sizes["parameters"] = sizes["gradients"] = sum(map(_here, jax.tree.leaves(params)))
    count = sum(x.size for x in jax.tree.leaves(params))
    notes = {name: f"undivided: {reason}" for name, reason in divided.undivided.items()}
    notes |= {name: f"moments in float32: {reason}" for name, reason in divided.widened.items()}
    return MemoryPlan(count, math.prod(mesh_shape.values()), **sizes, notes=notes)


def _mesh(shape) -> AbstractMesh:
    whole = isinstance(shape, Mapping) and all(isinstance(x, (int, np.integer)) and x > 0 for x in shape.values())
    if not whole or math.prod(shape.values()) >= 2**31:
        raise ValueError(
            f"mesh_shape must be a dict of axes and sizes > 0, below 2**31 in all, got {checks.short_repr(shape)}."
        )
    return AbstractMesh(tuple(map(int, shape.values())), tuple(shape))


def _here(x) -> int:
    """Bytes of an array on one device."""
    return math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize


def shapes_of(model: str, dtype=jnp.bfloat16) -> Any:
    """The parameters' shapes of a model by name: ``"gpt2"``, ``"llama-7b"`` or ``"llama-70b"``."""
    checks.check_one_of("model", model, tuple(MODELS))
    if (dtype := checks.floating_dtype("dtype", dtype)) is None:
        raise TypeError("dtype must be a floating dtype such as jnp.bfloat16, got None.")
    is_shape = lambda x: isinstance(x, tuple)
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), MODELS[model](), is_leaf=is_shape)


FORMATS = {
    "float32": (jnp.float32, adamw(1e-3)),
    "bfloat16": (jnp.float32, adamw(1e-3, moments="bfloat16")),
    "int8": (jnp.float32, adamw(1e-3, moments="int8")),
    "bfloat16 + exact_bf16": (jnp.bfloat16, exact_bf16(adamw(1e-3, moments="bfloat16"))),
    "int8 + exact_bf16": (jnp.bfloat16, exact_bf16(adamw(1e-3, moments="int8"))),
}


def draw(plans: Mapping[str, MemoryPlan], title: str) -> Any:
    """A bar for every plan, of what takes how much: a `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(plans)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(plans))
    colors = ("#0072b2", "#56b4e9", "#d55e00", "#f0e442")  # Okabe & Ito's, which the colour-blind tell apart
    for part, color in zip(PARTS, colors, strict=False):
        width = np.array([getattr(x, part) / GIB for x in plans.values()])
        axes.barh(list(plans), width, left=left, label=part, color=color)
        left += width
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * left.max())
    axes.set(xlabel="GiB on each device", title=title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.12), ncols=len(colors), frameon=False)
    return figure
