"""The optimizer's state divided over a mesh (ZeRO stage 1), by JAX's own partitioning.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, arXiv:1910.02054,
section 5.1: each device keeps the state of a part of the parameters. A step reduces gradients to where that part is,
updates it, and gathers the parameters.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jadam._core import checks
from jadam._core.trees import leaf_name, match_state_to_params, params_with_gradients
from jadam._fused.step import step_sharded, update_and_apply
from jadam._moments.formats import is_placeholder, placeholder
from jadam._moments.int8 import BLOCK, largest_block
from jadam._transformation.transformation import FunctionUpdate, NotFusible, not_fusible


@dataclasses.dataclass(eq=False)
class _Zero1Update(FunctionUpdate):
    """``update`` of `zero1`, and how it divides the state."""

    layout: "Layout" = dataclasses.field(kw_only=True)


class Zero1(optax.GradientTransformationExtraArgs):
    """What `zero1` returns: an Optax transformation, and how it divides its state."""

    @property
    def layout(self) -> "Layout":
        """What ``update`` holds."""
        return cast(_Zero1Update, self.update).layout

    @property
    def shardings(self) -> Any:
        """The state's, a tree of `jax.sharding.NamedSharding`."""
        return jax.tree.map(lambda x: x.sharding, self.layout.state)

    @property
    def undivided(self) -> dict[str, str]:
        """The parameters whose state is not divided, and why."""
        return {x.name: x.reason for x in self.layout.leaves if x.reason}

    @property
    def widened(self) -> dict[str, str]:
        """The parameters whose moments are float32 instead of int8, and why."""
        return {x.name: x.widened for x in self.layout.leaves if x.widened}

    def __repr__(self):
        leaves = [x for x in self.layout.leaves if x.bytes]
        divided = sum(not x.reason for x in leaves)
        lines = [f"zero1: the state of {divided} of {len(leaves)} parameters divided by {self.layout.over}"]
        lines += [f"  undivided: {name}: {reason}" for name, reason in self.undivided.items()]
        lines += [f"  float32: {name}: {reason}" for name, reason in self.widened.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: where it is, where the part of it that a device updates is, and its state's bytes on all devices."""

    name: str
    shape: tuple[int, ...]
    param_sharding: NamedSharding
    state_sharding: NamedSharding
    bytes: int
    reason: str  # why it is not divided, or ""
    widened: str  # why its moments are float32 instead of int8, or ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `zero1` divides: a `Leaf` for each parameter, and the state as `jax.ShapeDtypeStruct` with shardings."""

    leaves: tuple[Leaf, ...]
    state: Any
    over: str


def zero1(tx: optax.GradientTransformation, params, mesh, axis: str | Sequence[str]) -> Zero1:
    """Divide the state of ``tx`` over an axis of a mesh: on ``n`` devices each keeps an n-th of it.

    Moments, scales and remainders are divided along a parameter's first axis that divides evenly, on top of the
    parameter's own sharding, whatever that is. int8's blocks are chosen so that each part has whole ones. The result is
    a transformation: ``init`` makes the state divided from the start, in `jadam.step` (or ``update``) the gradients are
    reduced to their parts, the parts updated, by the kernels where `jadam.step` has them, and the parameters gathered.
    Update and state are the same bits as on one device that has the same blocks; only a global norm is a sum in another
    order.

    Args:
        tx: any Optax transformation, `jadam.exact_bf16` and chains included; make this the outermost.
        params: parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`). Their own `NamedSharding` is kept;
            without one they count as whole on every device.
        mesh: `jax.sharding.Mesh`; an `AbstractMesh` will do for looking at ``shardings``.
        axis: the axis of the mesh to divide over, or several.

    Returns:
        A transformation with the state of ``tx``. It has ``shardings``, a tree of `jax.sharding.NamedSharding` like the
        state, and ``undivided``, a dict from a parameter's path to why its state is whole; print it for both in words.

    Raises:
        ValueError: no such axis, one of size 1, or nothing that can be divided; at ``init`` and ``update``, other
            parameters or a mesh without devices.
        TypeError: ``tx`` is no transformation, ``mesh`` no mesh, or a parameter is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("data",))
        >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(3)}
        >>> tx = jadam.sharding.zero1(jadam.adamw(1e-3), params, mesh, "data")
        >>> print(tx)
        zero1: the state of 1 of 2 parameters divided by 8 ('data')
          undivided: ['bias']: no axis of (3,) is a multiple of 8
        >>> print(*tx.init(params)[0].mu["kernel"].sharding.spec)
        data
    """
    checks.check_transformation("zero1 needs", tx)
    _checks_mesh(mesh)
    axes = tuple(name for name in _axes(axis, mesh) if mesh.shape[name] > 1)
    if not axes:
        raise ValueError(f"axis {axis!r} has size 1 in the mesh {dict(mesh.shape)}: there is nothing to divide over.")
    checks.check_trainable(params, "params")
    layout = _layout(tx, params, mesh, axes)
    inner = optax.with_extra_args_support(optax.GradientTransformation(tx.init, tx.update))
    param_shardings, state_shardings = (
        [getattr(leaf, which) for leaf in layout.leaves] for which in ("param_sharding", "state_sharding")
    )
    wanted = jax.tree.leaves(layout.state)
    shardings = [x.sharding for x in wanted]

    def values(tree, what):
        checks.check_values(tree, what)
        if isinstance(mesh, AbstractMesh) and not all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
            raise ValueError(
                "mesh must be a jax.sharding.Mesh for init and update, got an AbstractMesh, which has no devices and "
                "is for looking at shardings. Call zero1 again with jax.make_mesh(...)."
            )

    def check(tree, what):
        values(tree, what)
        shapes, known = [jnp.shape(x) for x in jax.tree.leaves(tree)], [x.shape for x in layout.leaves]
        if shapes != known:
            here, there = next(pair for pair in itertools.zip_longest(shapes, known) if pair[0] != pair[1])
            raise ValueError(
                f"{what} must have the leaves of the params given to zero1, got {len(shapes)} of {len(known)}; the "
                f"first that differs has shape {here} for {there}. Call zero1 again for other parameters."
            )

    def checked(state):
        """The state, which may come from elsewhere than the mesh, on it."""
        values(state, "state")
        here, there = len(jax.tree.leaves(state)), len(wanted)
        if here != there:
            raise TypeError(
                f"state must have the {there} arrays that init returns, got {type(state).__name__} of {here}. Was it "
                "made by another transformation? It goes before params."
            )
        for (path, x), of_init in zip(jax.tree_util.tree_leaves_with_path(state), wanted, strict=True):
            try:
                of_init.sharding.shard_shape(jnp.shape(x))
            except ValueError:
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, init returns {of_init.shape}. Was it "
                    "made by another transformation, or for other parameters?"
                ) from None
        return _put(state, shardings, leave=True)

    def init(params):
        check(params, "params")
        checks.check_trainable(params, "params")

        def whole(params):
            return list(map(_reshaped, jax.tree.leaves(tx.init(params)), wanted))

        state = jax.jit(whole, out_shardings=shardings)(_put(params, param_shardings))
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, params)), state)

    def update(updates, state, params=None, **extra_args):
        check(updates, "updates")
        state = checked(state)
        updates = _put(updates, state_shardings)
        if params is not None:
            params, _ = params_with_gradients(params, updates)
            check(params, "params")
            params = _put(params, state_shardings)
        updates, state = inner.update(updates, state, params, **extra_args)
        return _put(updates, param_shardings), _put(state, shardings)

    def step(grads, state, params):
        check(grads, "grads")
        params, put = params_with_gradients(params, grads)
        check(params, "params")
        state = checked(state)
        grads, params = _put(grads, state_shardings), _put(params, state_shardings)
        try:
            params, state = step_sharded(
                tx, grads, state, params, mesh, [x.spec for x in state_shardings], _shard_offset
            )
        except NotFusible:
            params, state = update_and_apply(tx, grads, state, params)
        return put(jax.tree.leaves(_put(params, param_shardings))), _put(state, shardings)

    return Zero1(init, _Zero1Update(not_fusible, inner=tx, step=step, function=update, layout=layout))


def spread(shapes, mesh, axis: str | Sequence[str] | None) -> Any:
    """Parameters divided over an axis of a mesh, each along its largest dimension that divides.

    The last dimension is that only if its parts are multiples of 128, as lanes and int8's blocks are, or no other can.

    Args:
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: `jax.sharding.Mesh` or `AbstractMesh`.
        axis: an axis of it, several, or None to leave them whole.

    Returns:
        A tree of `jax.ShapeDtypeStruct` with shardings; `jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), ...)`
        puts parameters there.

    Raises:
        ValueError: no such axis.
        TypeError: ``mesh`` is no mesh.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
        >>> print(*jadam.sharding.spread(jnp.ones((2, 8)), mesh, "model").sharding.spec)
        None model
    """
    checks.check_arrays(shapes, "shapes")
    _checks_mesh(mesh)
    axes = () if axis is None else _axes(axis, mesh)
    n = math.prod(mesh.shape[name] for name in axes)

    def place(x):
        shape = jnp.shape(x)
        odd = lambda k: k == len(shape) - 1 and shape[k] // n % BLOCK != 0
        order = sorted(range(len(shape)), key=lambda k: (odd(k), -shape[k]))
        specs = (_with(PartitionSpec(*[None] * len(shape)), k, axes) for k in order)
        fits = (spec for spec in specs if all(_fits(shape, spec, mesh)))
        spec = next(fits, PartitionSpec()) if axes else PartitionSpec()
        sharding = NamedSharding(mesh, _trimmed(spec))
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x), sharding=sharding)

    return jax.tree.map(place, shapes)


def _checks_mesh(mesh) -> None:
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        got = checks.short_repr(mesh)
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {got}. Make one: jax.make_mesh((8,), ('data',)).")


def _axes(axis, mesh) -> tuple[str, ...]:
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or any(not isinstance(name, str) or name not in mesh.shape for name in axes):
        raise ValueError(f"axis must be of the mesh's {tuple(mesh.shape)}, got {checks.short_repr(axis)}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must name each axis of the mesh once, got {axis!r}.")
    return axes


def _layout(tx, params, mesh, axes) -> Layout:
    n = math.prod(mesh.shape[name] for name in axes)
    flat = jax.tree_util.tree_leaves_with_path(params)
    plain = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in flat
    ]  # shardings not to be seen by init
    state = jax.eval_shape(tx.init, jax.tree.unflatten(jax.tree.structure(params), plain))
    names = [leaf_name(path) for path, _ in flat]
    states, structure = jax.tree.flatten(state)
    owned: dict[str, list] = {name: [] for name in names}
    for (name, _), x in zip(match_state_to_params(state, params), states, strict=True):
        if name is not None:
            owned[name].append(x)
    leaves = {}
    for name, (_, x), p in zip(names, flat, plain, strict=True):
        param_sharding = _param_sharding(x, mesh, name)
        large = [s for s in owned[name] if s.shape == p.shape]
        int8 = any(s.dtype == jnp.uint8 for s in large)
        whole = PartitionSpec(*param_sharding.spec, *[None] * (len(p.shape) - len(param_sharding.spec)))
        widened = ""
        if int8 and largest_block(p.shape[-1], here := param_sharding.shard_shape(p.shape)[-1]) is None:
            int8, widened = False, f"its own sharding cuts its last axis into {here}, {_NO_BLOCK}"
        spec, reason = _divided(p.shape, whole, mesh, axes, int8)
        size = sum(s.size * s.dtype.itemsize for s in owned[name])
        reason = reason if large else "no state of its shape" if size else ""
        state_sharding = NamedSharding(mesh, spec if large and not reason else whole)
        leaves[name] = Leaf(name, p.shape, param_sharding, state_sharding, size, reason, widened)

    def place(owner, x):
        name, field = owner
        leaf = leaves.get(name)
        spec, shape, dtype = PartitionSpec(), x.shape, x.dtype
        if leaf is not None and x.shape == leaf.shape:
            spec = leaf.state_sharding.spec
            dtype = jnp.float32 if leaf.widened and field in ("mu", "nu") else dtype
        elif leaf is not None and field in ("mu_scale", "nu_scale") and not is_placeholder(x):
            if leaf.widened:
                return place((None, None), jax.eval_shape(placeholder, x))
            block = largest_block(leaf.shape[-1], leaf.state_sharding.shard_shape(leaf.shape)[-1])
            spec, shape = leaf.state_sharding.spec, (*x.shape[:-1], -(-leaf.shape[-1] // block))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, _trimmed(spec)))

    placed = [place(owner, x) for owner, x in zip(match_state_to_params(state, params), states, strict=True)]
    if all(x.reason for x in leaves.values() if x.bytes):
        whole = "; ".join(f"{x.name}: {x.reason}" for x in list(leaves.values())[:5] if x.bytes)
        raise ValueError(f"zero1 can divide no parameter's state by {n} ({axes}): {whole or 'there is none'}.")
    over = f"{n} ({', '.join(map(repr, axes))})"
    return Layout(tuple(leaves.values()), structure.unflatten(placed), over)


def _param_sharding(x, mesh, what) -> NamedSharding:
    """A parameter's own sharding; whole where it has none."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return NamedSharding(mesh, PartitionSpec())
    own = {name: sharding.mesh.shape[name] for entry in sharding.spec for name in _names(entry)}
    if not own.items() <= dict(mesh.shape).items():
        raise ValueError(
            f"{what} is sharded over {own}, which the mesh {dict(mesh.shape)} has not. Pass the parameters' own mesh."
        )
    return sharding


def _trimmed(spec) -> PartitionSpec:
    """Without the Nones at the end, as XLA returns it: another would compile the second step anew."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _with(spec, k: int, axes) -> PartitionSpec:
    """``spec`` whose entry ``k`` has ``axes`` too."""
    entry = (*_names(spec[k]), *axes)
    return PartitionSpec(*spec[:k], entry[0] if len(entry) == 1 else entry, *spec[k + 1 :])


def _ways(entry, mesh) -> int:
    """Into how many parts an entry of a spec cuts."""
    return math.prod(mesh.shape[name] for name in _names(entry))


def _fits(shape, spec, mesh) -> list[bool]:
    """For each dimension whether it divides evenly, and is not empty."""
    return [size > 0 and size % _ways(entry, mesh) == 0 for size, entry in zip(shape, spec, strict=True)]


def _names(entry) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _divided(shape, spec, mesh, axes, int8) -> tuple[PartitionSpec, str]:
    """``spec`` with ``axes`` added where they divide, and why they do not."""
    used = {name for entry in spec for name in _names(entry)}
    axes = tuple(name for name in axes if name not in used)
    n = math.prod(mesh.shape[name] for name in axes)
    reason = f"no axis of {shape} is a multiple of {n}"
    if not axes:
        return spec, ""
    for k, size in enumerate(shape):
        wanted = _with(spec, k, axes)
        here = size // _ways(wanted[k], mesh)
        if not _fits(shape, wanted, mesh)[k]:
            continue
        if int8 and k == len(shape) - 1 and largest_block(size, here) is None:
            reason = f"its last axis would be cut into {here}, {_NO_BLOCK}"
            continue
        return wanted, ""
    if used:
        reason += f" beside {spec}"
    return spec, reason


_NO_BLOCK = "which no block of 32 to 128 divides"


def _reshaped(x, wanted):
    """A new state's array, codes and scales being 0, in the blocks or the dtype wanted."""
    return x.astype(wanted.dtype) if x.shape == wanted.shape else jnp.zeros(wanted.shape, wanted.dtype)


def _put(tree, shardings, *, leave: bool = False):
    """``tree`` where ``shardings`` say, by communication within a traced function.

    ``leave`` leaves alone what is on the same devices already.
    """

    def one(x, sharding):
        concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        there = leave and concrete and x.sharding.device_set == sharding.device_set
        return x if there else _put_one(x, sharding)

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(list(map(one, leaves, shardings)))


def _put_one(x, sharding: NamedSharding):
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _shard_offset(shape, spec, mesh) -> jax.Array:
    """Within `jax.shard_map`: the index in an array of ``shape`` of the first element that this device has."""
    first, stride = jnp.uint32(0), 1
    for size, entry in reversed(list(zip(shape, spec, strict=True))):
        names = _names(entry)
        if names:
            here = size // _ways(entry, mesh)
            first += jax.lax.axis_index(names).astype(jnp.uint32) * jnp.uint32(here * stride & 0xFFFFFFFF)
        stride *= size
    return first
