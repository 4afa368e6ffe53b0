"""The optimizer state on a mesh: sharded like the parameters, or further over a mesh axis (ZeRO stage 1).

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, arXiv:1910.02054,
section 5.1: each device keeps the state of its shard of the parameters. A step reduces the gradients to this shard,
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
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jadam._core import checks
from jadam._core.meshes import mesh_axes, mesh_of
from jadam._core.trees import leaf_names, match_state_to_params, params_tree, params_with_gradients
from jadam._fused.shards import axis_names, num_shards, padded
from jadam._fused.step import step_sharded, update_and_apply
from jadam._moments.formats import is_placeholder, placeholder
from jadam._moments.int8 import BLOCK, largest_block
from jadam._transformation.transformation import CustomUpdateFn, NotFusible, raise_not_fusible, update_of


@dataclasses.dataclass(eq=False)
class _ShardedUpdateFn(CustomUpdateFn):
    """``update`` of `sharded` and `zero1`, with the layout of the state."""

    layout: "Layout" = dataclasses.field(kw_only=True)


class Sharded(optax.GradientTransformationExtraArgs):
    """An Optax transformation whose state is sharded, as `sharded` and `zero1` return it."""

    @property
    def layout(self) -> "Layout":
        """The shardings of parameters and state."""
        return cast(_ShardedUpdateFn, self.update).layout

    @property
    def shardings(self) -> Any:
        """The shardings of the state, a tree of `jax.sharding.NamedSharding` like it."""
        return jax.tree.map(lambda x: x.sharding, self.layout.state)

    @property
    def abstract_state(self) -> Any:
        """The shapes, dtypes and shardings of the state, a tree of `jax.ShapeDtypeStruct`, to restore a checkpoint."""
        return self.layout.state

    @property
    def undivided(self) -> dict[str, str]:
        """The parameters whose state `zero1` does not shard over its axis, and why not."""
        return {x.name: x.reason for x in self.layout.leaves if x.reason}

    @property
    def widened(self) -> dict[str, str]:
        """The parameters whose moments are float32 instead of int8, and why."""
        return {x.name: x.widened for x in self.layout.leaves if x.widened}

    def __repr__(self):
        leaves = [x for x in self.layout.leaves if x.bytes]
        sharded = sum(not x.reason for x in leaves)
        lines = ["sharded: the state has the shardings of the parameters"]
        if self.layout.ways:
            lines = [f"zero1: state of {sharded} of {len(leaves)} parameters sharded {self.layout.ways}"]
        lines += [f"  undivided: {name}: {reason}" for name, reason in self.undivided.items()]
        lines += [f"  float32: {name}: {reason}" for name, reason in self.widened.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter, its sharding and that of its state."""

    name: str
    shape: tuple[int, ...]
    param_sharding: NamedSharding
    state_sharding: NamedSharding
    bytes: int  # of its state, as global arrays
    reason: str  # why its state is not sharded over the axis, or ""
    widened: str  # why its moments are float32 instead of int8, or ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of parameters and state."""

    leaves: tuple[Leaf, ...]  # one per parameter
    state: Any  # `jax.ShapeDtypeStruct` with shardings
    ways: str  # the number of shards and the mesh axes of `zero1`, such as "8 ways ('data')"; else ""


def zero1(tx: optax.GradientTransformation, params, mesh, axis: str | Sequence[str]) -> Sharded:
    """Shard the state of ``tx`` over a mesh axis: of ``n`` devices, each keeps an n-th of it.

    Moments, scales and remainders are sharded along the first dimension of a parameter that is a multiple of the
    number of shards, in addition to the parameter's own sharding. int8 block sizes are chosen so that each shard has
    whole blocks.

    ``init`` returns a sharded state. `jadam.step` reduces the gradients to shards, updates these (with kernels where
    available) and gathers the parameters. ``update`` gathers the updates instead. The results have the same bits as on
    one device with the same blocks. Only a global norm may differ, because its sum has another order.

    Args:
        tx: any Optax transformation, also `jadam.exact_bf16` and chains. `zero1` must be the outermost wrapper.
        params: parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`). Their own `NamedSharding` is kept.
            Parameters without one are taken as replicated.
        mesh: `jax.sharding.Mesh`, or an `AbstractMesh` to inspect ``shardings`` only.
        axis: the mesh axis to shard over, or several.

    Returns:
        A transformation whose state is that of ``tx``. It prints as a summary. It has ``shardings``, a tree of
        `jax.sharding.NamedSharding` like the state, and two dicts from a parameter's path to a reason: ``undivided``,
        why its state is not sharded, and ``widened``, why its moments are float32 instead of int8.

    Raises:
        ValueError: no such axis, an axis of size 1, or no state that can be sharded. In ``init`` and ``update``: other
            parameters, or a mesh without devices.
        TypeError: ``tx`` is not a transformation, ``mesh`` is not a mesh, or a parameter is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("data",))
        >>> params = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(3)}
        >>> tx = jadam.sharding.zero1(jadam.adamw(1e-3), params, mesh, "data")
        >>> print(tx)
        zero1: state of 1 of 2 parameters sharded 8 ways ('data')
          undivided: ['bias']: no dimension of (3,) is a multiple of 8
        >>> print(*tx.init(params)[0].mu["kernel"].sharding.spec)
        data
    """
    checks.check_transformation("zero1 needs", tx)
    _check_mesh(mesh)
    axes = tuple(name for name in mesh_axes(axis, mesh) if mesh.shape[name] > 1)
    if not axes:
        raise ValueError(
            f"axis must have size > 1, got {axis!r} in the mesh {dict(mesh.shape)}. Choose another axis or a larger "
            "mesh; on one device use tx without zero1."
        )
    return _sharded(tx, params, mesh, axes, "zero1")


def sharded(tx: optax.GradientTransformation, params, mesh) -> Sharded:
    """Declare how the parameters are sharded. The state is sharded likewise, also by ``init`` within `jax.jit`.

    It is needed in two cases. On a TPU mesh whose axes are ``Auto``, `jadam.step` cannot find the shardings itself, and
    takes several passes over memory for bfloat16 and int8 moments and with `jadam.exact_bf16`. On any platform,
    ``tx.init`` within `jax.jit` cannot fit int8 blocks to parameters whose last axis is sharded.

    Moments, scales and remainders are sharded like their parameter. int8 block sizes are chosen so that each shard has
    whole blocks. The results have the same bits as on one device with the same
    blocks. Only a global norm may differ, because its sum has another order.

    Args:
        tx: any Optax transformation, also `jadam.exact_bf16` and chains. `sharded` must be the outermost wrapper.
        params: parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`), with a `NamedSharding`. Those without
            one are taken as replicated.
        mesh: `jax.sharding.Mesh`, or an `AbstractMesh` to inspect ``shardings`` only.

    Returns:
        A transformation as `zero1` returns it.

    Raises:
        ValueError: no parameter has a sharding. In ``init`` and ``update``: other parameters, or a mesh without
            devices.
        TypeError: ``tx`` is not a transformation, ``mesh`` is not a mesh, or a parameter is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.Mesh(jax.devices(), ("fsdp",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        >>> params = jax.device_put({"kernel": jnp.ones((64, 128))}, sharding)
        >>> tx = jadam.sharding.sharded(jadam.adamw(1e-3, moments="int8"), params, mesh)
        >>> tx
        sharded: the state has the shardings of the parameters
        >>> print(*tx.init(params)[0].mu["kernel"].sharding.spec)
        fsdp
    """
    checks.check_transformation("sharded needs", tx)
    _check_mesh(mesh)
    mesh_of(params)
    return _sharded(tx, params, mesh, (), "sharded")


def state_shardings(tx: optax.GradientTransformation, params) -> Any:
    """Return the shardings of ``tx``'s state: moments, scales and remainders like their parameter, others replicated.

    They are those of ``tx.init(params)`` outside of `jax.jit`, which leaves counters on one device. Use them as
    ``in_shardings`` and ``out_shardings`` of a training step, to restore a checkpoint, or in ``jax.jit(tx.init,
    out_shardings=...)``. Under `jax.jit`, ``tx.init`` does not know the shardings of ``params``: if they cut int8
    blocks of 128, use ``sharded(tx, params, mesh).init``.

    Args:
        tx: any Optax transformation.
        params: parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`), with a `NamedSharding` of one mesh.
            Those without one are taken as replicated. Not used for a ``tx`` that `sharded` or `zero1` returned.

    Returns:
        A tree of `jax.sharding.NamedSharding` like the state.

    Raises:
        ValueError: no parameter has a sharding, or they lie on several meshes.
        TypeError: ``tx`` is not a transformation, or a parameter is not floating.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.AbstractMesh((4,), ("fsdp",))
        >>> sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        >>> params = {"kernel": jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=sharding)}
        >>> jadam.sharding.state_shardings(jadam.adamw(1e-3), params)[0].mu["kernel"].spec[0]
        'fsdp'
    """
    checks.check_transformation("state_shardings needs", tx)
    if isinstance(tx, Sharded):
        return tx.shardings
    return sharded(tx, params, mesh_of(params)).shardings


def _sharded(tx: optax.GradientTransformation, params, mesh, axes: tuple[str, ...], name: str) -> Sharded:
    """`zero1` over ``axes``, or `sharded` without any. ``name`` is that of the public function."""
    inner_update = update_of(tx)
    params = params_tree(params)
    params = inner_update.without_untrainable(params, params)
    checks.check_trainable(params, "params")
    layout = _layout(tx, params, mesh, axes)
    inner = optax.with_extra_args_support(tx)
    param_shardings, state_shardings = (
        [getattr(leaf, which) for leaf in layout.leaves] for which in ("param_sharding", "state_sharding")
    )
    state_leaves = jax.tree.leaves(layout.state)
    shardings = [x.sharding for x in state_leaves]

    def check_concrete(tree, what):
        """Raise unless the arrays have values and the mesh has devices."""
        checks.check_values(tree, what)
        if isinstance(mesh, AbstractMesh) and not all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
            raise ValueError(
                "mesh must be a jax.sharding.Mesh for init, update and jadam.step, got an AbstractMesh, which has no "
                f"devices. Call {name} again with jax.make_mesh(...)."
            )

    def check_params_like(tree, what):
        """Raise unless ``tree`` has the shapes of the parameters that were given."""
        check_concrete(tree, what)
        shapes, expected = [jnp.shape(x) for x in jax.tree.leaves(tree)], [x.shape for x in layout.leaves]
        if shapes != expected:
            found, wanted = next(pair for pair in itertools.zip_longest(shapes, expected) if pair[0] != pair[1])
            raise ValueError(
                f"{what} must match the params given to {name} (number of arrays: {len(expected)}), got {len(shapes)}. "
                f"First mismatch: shape {found}, expected {wanted}. Call {name} again for other parameters."
            )

    specs = [padded(x.spec, len(leaf.shape)) for x, leaf in zip(state_shardings, layout.leaves, strict=True)]

    def check_state(state):
        """Raise unless the state has the shapes of the layout, or other ones that it divides."""
        check_concrete(state, "state")
        found, expected = len(jax.tree.leaves(state)), len(state_leaves)
        if found != expected:
            raise TypeError(
                f"state must have the {expected} arrays that init returns, got {type(state).__name__} of {found}. It "
                "belongs to another optimizer, or the argument order is not grads, state, params."
            )
        for (path, x), leaf in zip(jax.tree_util.tree_leaves_with_path(state), state_leaves, strict=True):
            try:
                leaf.sharding.shard_shape(jnp.shape(x))
            except ValueError:
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} must have shape {leaf.shape}, got {jnp.shape(x)}. It belongs "
                    "to another optimizer or to other parameters."
                ) from None

    def init(params):
        params = inner_update.without_untrainable(params, params)
        check_params_like(params, "params")
        checks.check_trainable(params, "params")

        # New codes and scales are all 0, in whatever number of blocks.
        fit = lambda x, leaf: x.astype(leaf.dtype) if x.shape == leaf.shape else jnp.zeros(leaf.shape, leaf.dtype)
        init_leaves = lambda params: list(map(fit, jax.tree.leaves(tx.init(params)), state_leaves))
        state = jax.jit(init_leaves, out_shardings=shardings)(_to_shardings(params, param_shardings))
        return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(tx.init, params)), state)

    def update(updates, state, params=None, **extra_args):
        check_params_like(updates, "updates")
        check_state(state)
        state = _to_shardings(state, shardings, keep_on_mesh=True)
        updates = _to_shardings(updates, state_shardings)
        if params is not None:
            params, _ = params_with_gradients(params, updates)
            check_params_like(params, "params")
            params = _to_shardings(params, state_shardings)
        updates, state = inner.update(updates, state, params, **extra_args)
        return _to_shardings(updates, param_shardings), _to_shardings(state, shardings)

    def step(grads, state, params):
        grads = update_fn.without_untrainable(grads, params)
        check_params_like(grads, "grads")
        params, merge = params_with_gradients(params, grads)
        check_params_like(params, "params")
        check_state(state)
        grads = _to_shardings(grads, state_shardings)
        # Traced arrays are brought to their shards in step_sharded: a constraint more for each takes time to compile.
        state = _to_shardings(state, shardings, keep_on_mesh=True, keep_traced=True)
        params = _to_shardings(params, state_shardings, keep_traced=True)
        try:
            params, new_state = step_sharded(tx, grads, state, params, mesh, specs)
        except NotFusible:
            state, params = _to_shardings(state, shardings), _to_shardings(params, state_shardings)
            params, new_state = update_and_apply(tx, grads, state, params)
        return merge(jax.tree.leaves(_to_shardings(params, param_shardings))), _to_shardings(new_state, shardings)

    update_fn = _ShardedUpdateFn(
        raise_not_fusible,
        inner=tx,
        step=step,
        is_frozen=inner_update.is_frozen,
        fills_frozen=True,  # it has a place in the layout
        function=update,
        layout=layout,
    )
    return Sharded(init, update_fn)


def shard_largest_dim(shapes, mesh, axis: str | Sequence[str] | None) -> Any:
    """Choose shardings of parameters over a mesh axis, along the largest dimension that divides evenly.

    The last dimension is used only if its shards are multiples of 128, as TPU lanes and int8 blocks are, or if no other
    dimension divides. A parameter of which no dimension divides is replicated.

    Args:
        shapes: a tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: `jax.sharding.Mesh` or `AbstractMesh`.
        axis: a mesh axis, several, or None to replicate all parameters.

    Returns:
        A tree of `jax.ShapeDtypeStruct` with shardings. Move parameters by
        ``jax.tree.map(lambda p, s: jax.device_put(p, s.sharding), params, ...)``.

    Raises:
        ValueError: no such axis.
        TypeError: ``mesh`` is not a mesh.

    Example:
        >>> import jax, jax.numpy as jnp, jadam
        >>> mesh = jax.sharding.AbstractMesh((4,), ("model",))
        >>> print(*jadam.sharding.shard_largest_dim(jnp.ones((2, 8)), mesh, "model").sharding.spec)
        None model
    """
    checks.check_arrays(shapes, "shapes")
    _check_mesh(mesh)
    axes = () if axis is None else mesh_axes(axis, mesh)
    n = math.prod(mesh.shape[name] for name in axes)

    def shard(x):
        shape = jnp.shape(x)
        cuts_blocks = lambda k: k == len(shape) - 1 and shape[k] // n % BLOCK != 0
        order = sorted(range(len(shape)), key=lambda k: (cuts_blocks(k), -shape[k]))
        specs = (_add_axes(PartitionSpec(*[None] * len(shape)), k, axes) for k in order)
        valid = (spec for spec in specs if all(_divides(shape, spec, mesh)))
        spec = next(valid, PartitionSpec()) if axes else PartitionSpec()
        sharding = _named_sharding(mesh, spec, len(shape))
        return jax.ShapeDtypeStruct(shape, jnp.result_type(x), sharding=sharding)

    return jax.tree.map(shard, shapes)


def _check_mesh(mesh) -> None:
    """Raise unless ``mesh`` is a mesh."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        got = checks.short_repr(mesh)
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {got}. Make one: jax.make_mesh((8,), ('data',)).")


def _layout(tx, params, mesh, axes) -> Layout:
    """Choose the sharding of every parameter's state."""
    n = math.prod(mesh.shape[name] for name in axes)
    flat = jax.tree_util.tree_leaves_with_path(params)
    # Without shardings, which would change the block sizes that tx.init chooses.
    unsharded = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in flat]
    state = jax.eval_shape(tx.init, jax.tree.unflatten(jax.tree.structure(params), unsharded))
    names = leaf_names(params)
    states, structure = jax.tree.flatten(state)
    param_states: dict[str, list] = {name: [] for name in names}
    for (name, _), x in zip(match_state_to_params(state, params), states, strict=True):
        if name is not None:
            param_states[name].append(x)
    leaves = {}
    for name, (_, x), p in zip(names, flat, unsharded, strict=True):
        param_sharding = _param_sharding(x, mesh, name)
        shardable = [s for s in param_states[name] if s.shape == p.shape]
        int8 = any(s.dtype == jnp.uint8 for s in shardable)
        param_spec = padded(param_sharding.spec, len(p.shape))
        widened = ""
        if int8 and largest_block(p.shape[-1], length := param_sharding.shard_shape(p.shape)[-1]) is None:
            int8, widened = False, f"its own sharding cuts its last dimension into shards of {length}, {_NO_BLOCK}"
        spec, reason = _shard_first_dim(p.shape, param_spec, mesh, axes, int8)
        size = sum(s.size * s.dtype.itemsize for s in param_states[name])
        reason = reason if shardable else "no array of its state has its shape" if size else ""
        state_sharding = NamedSharding(mesh, spec if shardable and not reason else param_spec)
        leaves[name] = Leaf(name, p.shape, param_sharding, state_sharding, size, reason, widened)

    def shard(match, x):
        name, field = match
        leaf = leaves.get(name)
        spec, shape, dtype = PartitionSpec(), x.shape, x.dtype
        if leaf is not None and x.shape == leaf.shape:
            spec = leaf.state_sharding.spec
            dtype = jnp.float32 if leaf.widened and field in ("mu", "nu") else dtype
        elif leaf is not None and field in ("mu_scale", "nu_scale") and not is_placeholder(x):
            if leaf.widened:
                return shard((None, None), jax.eval_shape(placeholder, x))
            block = largest_block(leaf.shape[-1], leaf.state_sharding.shard_shape(leaf.shape)[-1])
            spec, shape = leaf.state_sharding.spec, (*x.shape[:-1], -(-leaf.shape[-1] // block))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=_named_sharding(mesh, spec, len(shape)))

    sharded = [shard(match, x) for match, x in zip(match_state_to_params(state, params), states, strict=True)]
    ways = f"{n} ways ({', '.join(map(repr, axes))})" if axes else ""
    if axes and all(x.reason for x in leaves.values() if x.bytes):
        reasons = "; ".join(f"{x.name}: {x.reason}" for x in list(leaves.values())[:5] if x.bytes)
        raise ValueError(
            f"zero1 cannot shard the state of any parameter {ways}: {reasons or 'there is none'}. Choose another axis, "
            "or use tx without zero1."
        )
    return Layout(tuple(leaves.values()), structure.unflatten(sharded), ways)


def _param_sharding(x, mesh, path) -> NamedSharding:
    """The parameter's own sharding, or a replicated one."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return NamedSharding(mesh, PartitionSpec())
    own = {name: sharding.mesh.shape[name] for entry in sharding.spec for name in axis_names(entry)}
    if not own.items() <= dict(mesh.shape).items():
        raise ValueError(
            f"mesh must have the axes {own} that shard params{path}, got {dict(mesh.shape)}. Pass the parameters' mesh."
        )
    return sharding


def _named_sharding(mesh, spec, ndim: int) -> NamedSharding:
    """The sharding as JAX returns it. Otherwise the second step would be compiled again.

    Its spec has no trailing Nones on an auto mesh, and an entry for each dimension on an explicit one.
    """
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    spec = PartitionSpec(*entries)
    return NamedSharding(mesh, padded(spec, ndim) if mesh.are_all_axes_explicit else spec)


def _add_axes(spec, k: int, axes) -> PartitionSpec:
    """``spec`` with ``axes`` added to entry ``k``."""
    entry = (*axis_names(spec[k]), *axes)
    return PartitionSpec(*spec[:k], entry[0] if len(entry) == 1 else entry, *spec[k + 1 :])


def _divides(shape, spec, mesh) -> list[bool]:
    """Whether each dimension divides evenly and is not empty."""
    return [size > 0 and size % num_shards(entry, mesh) == 0 for size, entry in zip(shape, spec, strict=True)]


def _shard_first_dim(shape, spec, mesh, axes, int8) -> tuple[PartitionSpec, str]:
    """Add ``axes`` to the first dimension that divides evenly. Returns the spec, and the reason if none does."""
    used = {name for entry in spec for name in axis_names(entry)}
    axes = tuple(name for name in axes if name not in used)
    n = math.prod(mesh.shape[name] for name in axes)
    reason = f"no dimension of {shape} is a multiple of {n}"
    if not axes:
        return spec, ""
    for k, size in enumerate(shape):
        new = _add_axes(spec, k, axes)
        length = size // num_shards(new[k], mesh)
        if not _divides(shape, new, mesh)[k]:
            continue
        if int8 and k == len(shape) - 1 and largest_block(size, length) is None:
            reason = f"its last dimension would be cut into shards of {length}, {_NO_BLOCK}"
            continue
        return new, ""
    if used:
        reason += f" (on top of its own sharding {spec})"
    return spec, reason


_NO_BLOCK = "which no int8 block of 32 to 128 divides"


def _to_shardings(tree, shardings, *, keep_on_mesh: bool = False, keep_traced: bool = False):
    """Move the leaves of ``tree`` to ``shardings``, or constrain them in a traced function.

    ``keep_on_mesh`` leaves arrays that are already on the mesh's devices as they are, and ``keep_traced`` traced ones.
    """

    def move(x, sharding):
        """Move one array unless it may stay."""
        if isinstance(x, jax.core.Tracer):
            return x if keep_traced else _to_sharding(x, sharding)
        keep = keep_on_mesh and isinstance(x, jax.Array) and x.sharding.device_set == sharding.device_set
        return x if keep else _to_sharding(x, sharding)

    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(list(map(move, leaves, shardings)))


def _to_sharding(x, sharding: NamedSharding):
    """Move ``x`` to a sharding, traced or not."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, sharding)
    mesh = sharding.mesh
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if not explicit:
        return jax.lax.with_sharding_constraint(x, sharding)
    x = jax.sharding.reshard(x, NamedSharding(mesh, _with_axes(sharding.spec, explicit)))
    if mesh.are_all_axes_explicit:
        return x
    auto = set(mesh.axis_names).difference(explicit)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _with_axes(sharding.spec, auto)))


def _with_axes(spec, axes) -> PartitionSpec:
    """``spec`` with only these axes of the mesh."""
    return PartitionSpec(*(tuple(name for name in axis_names(entry) if name in axes) or None for entry in spec))
