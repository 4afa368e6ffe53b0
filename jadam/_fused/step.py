"""`jadam.step`: update parameters and moments in one pass over memory.

`step` builds one `LeafUpdate` per leaf, which calls the schedules and makes every scalar an array. It then binds one
JAX primitive for all leaves, with hashable settings.
"""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.meshes import explicit_mesh
from jadam._core.numerics import apply_updates
from jadam._core.trees import leaf_names, params_with_gradients
from jadam._fused import pallas, shards
from jadam._fused.cuda import kernel as cuda
from jadam._fused.mesh import step_on_explicit_mesh, step_on_mesh
from jadam._fused.native import call
from jadam._fused.primitive import flatten_arguments, step_p, unflatten_results
from jadam._transformation.transformation import ConcreteCount, NotFusible, pack, raise_not_fusible, update_of


def step(
    tx: optax.GradientTransformation, grads: optax.Updates, state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """Run ``tx.update`` and `optax.apply_updates` in one pass over memory.

    Adam's cost is memory traffic: at best 28 bytes per float32 parameter, each read or written once. On a CPU,
    ``tx.update`` and `optax.apply_updates` take at least two passes.

    jadam's optimizers are fused into one pass, also inside `jadam.chain` and `jadam.exact_bf16`. On CPUs and NVIDIA
    GPUs a compiled kernel does this, on a GPU for many leaves in one launch; see `jadam.backends`. On a TPU XLA does it
    for float32, and a Pallas kernel where XLA needs several passes, such as for int8 moments. XLA does leaves that no
    kernel supports. For any other transformation `step` calls ``tx.update`` and `optax.apply_updates`.
    `jadam.describe` shows what is fused, and the reason if not.

    On several devices each device updates its shards in the same way: on CPU and GPU under plain `jax.jit`, and on any
    platform on a mesh with explicit axes, with `jadam.sharding.sharded` or ``zero1``, and inside `jax.shard_map`. On a
    TPU mesh whose axes are ``Auto``, XLA does the step and partitions it, unless `jadam.sharding.sharded` declares the
    shardings. Where parameters and state are sharded alike, nothing is sent between devices.

    The state may be in host memory between steps, not within. Before `step` and in the same jitted function, call
    ``state = jax.device_put(state, jax.memory.Space.Device)``, and after it ``jax.device_put(state,
    jax.memory.Space.Host)``.

    Args:
        tx: any Optax transformation. Transformations that need extra arguments are not supported.
        grads: gradients, a tree like ``params``.
        state: the state of ``tx``.
        params: parameters.

    Returns:
        ``(params, state)``: the new parameters, not updates to apply. Donate both and pass them in this order, as
        below, to update them in place. JAX gives the first donated array of a shape to the first result of that shape.
        In another order XLA must copy. A loop that is interrupted between the donation and the assignment, as in a
        notebook, has lost both: keep a copy, or do not donate.

    Raises:
        ValueError: arrays are on different devices, or were donated to an earlier step; the state is in host memory;
            and what ``tx.update`` raises.
        TypeError: a leaf is not an array; and what ``tx.update`` raises.

    Example:
        >>> import functools, jax, jax.numpy as jnp, jadam
        >>> tx = jadam.adamw(0.1)
        >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
        ... def train_step(params, state, x):
        ...     grads = jax.grad(lambda w: jnp.sum((w - x) ** 2))(params)
        ...     return jadam.step(tx, grads, state, params)
        >>> params = jnp.ones(2)
        >>> params, state = train_step(params, tx.init(params), jnp.array([0.0, 3.0]))
        >>> print(*(f"{x:.2f}" for x in params))
        0.90 1.10
    """
    checks.check_transformation("step needs", tx)
    update = update_of(tx)
    if update.step is not None:
        return update.step(grads, state, params)
    if update.leafwise is raise_not_fusible:
        return update_and_apply(tx, grads, state, params)
    grads = update.without_untrainable(grads, params)
    all_params = params
    params, merge = params_with_gradients(params, grads)
    for tree, what in ((grads, "grads"), (state, "state"), (params, "params")):
        checks.check_values(tree, what)
    checks.check_same_devices(grads=grads, state=state, params=params)
    if grads is None or params is None:
        raise ValueError(f"{'params' if params is None else 'grads'} is None. Call step(tx, grads, state, params).")
    try:
        leaf_updates, rebuild_state = update.leafwise(grads, state, params)
    except NotFusible:
        return update_and_apply(tx, grads, state, all_params)
    leaves, structure = jax.tree.flatten(params)
    mesh = explicit_mesh(leaves)
    if mesh is None:
        arrays, static = flatten_arguments(leaf_updates, jax.tree.leaves(grads), leaves)
        leaves, arrays = unflatten_results(static["treedef"], step_p.bind(*arrays, **static))
    else:
        leaves, arrays = step_on_explicit_mesh(leaf_updates, jax.tree.leaves(grads), leaves, mesh)
    untouched = [x.frozen and x.remainder is None for x in leaf_updates]
    leaves = [old if keep else new for keep, old, new in zip(untouched, jax.tree.leaves(params), leaves, strict=True)]
    # checkify looks for NaN only after primitives that it knows, such as mul. XLA removes this product with 1.
    leaves = [jax.lax.mul(p, np.ones([], p.dtype)) if isinstance(p, jax.core.Tracer) else p for p in leaves]
    return merge(leaves), _after_step(update, rebuild_state(arrays), structure.unflatten(leaves))


def update_and_apply(tx, grads, state, params):
    """One step by ``tx.update`` and `optax.apply_updates`."""
    updates, state = tx.update(grads, state, params)
    params, merge = params_with_gradients(params, updates)
    names, old, new = leaf_names(params), jax.tree.leaves(params), jax.tree.leaves(apply_updates(params, updates))
    is_frozen = update_of(tx).is_frozen or (lambda name: False)
    return merge([p if is_frozen(name) else x for name, p, x in zip(names, old, new, strict=True)]), state


def why_not_fused(tx, grads, state, params) -> str | None:
    """Return why `step` cannot be fused on any platform, or None. Raises what ``tx.update`` raises."""

    def try_fuse(grads, state, params):
        """Raise `NotFusible`, or return arrays, as a traced function must."""
        return pack(update_of(tx).leafwise(grads, _with_concrete_counts(state), params).leaf_updates)[1]

    try:
        jax.eval_shape(try_fuse, grads, state, params)
    except NotFusible as reason:
        return str(reason)
    return None


def _with_concrete_counts(state):
    """``state`` with every count replaced by a NumPy 0, so that schedules get a number while all else is traced."""
    is_count = lambda x: jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda x: np.zeros([], x.dtype).view(ConcreteCount) if is_count(x) else x, state)


def why_leaves_not_fused(
    platform, tx, grads, state, params, shard_shapes=None, shardings_known=True
) -> list[tuple[str, str | None]]:
    """Return for each leaf its `jadam.by_path` rule and why it is not fused on ``platform``; both may be None.

    On a CPU the kernel is assumed to be available. On a mesh, ``shard_shapes`` has the shape of each leaf's shards, and
    ``shardings_known`` tells whether `step` knows them when it is lowered.
    """
    found = []

    def unsupported_reason(leaf_update, g, p):
        """Return why a leaf, or its shard, is not updated in one pass."""
        if platform == "cpu":
            return call.unsupported_reason(leaf_update, g, p)
        if platform == "cuda":
            return cuda.why_several_passes(leaf_update, g, p)
        if not shardings_known and not pallas.fused_by_xla(leaf_update):
            return "on several devices it needs jadam.sharding.sharded"
        return pallas.why_several_passes(leaf_update, g, p)

    def find_reasons(grads, state, params):
        """Append every leaf's group and reason to ``found``."""
        leaf_updates = update_of(tx).leafwise(grads, _with_concrete_counts(state), params).leaf_updates
        leaves = jax.tree.leaves(params)
        shapes = [p.shape for p in leaves] if shard_shapes is None else shard_shapes
        for leaf_update, g, p, shape in zip(leaf_updates, jax.tree.leaves(grads), leaves, shapes, strict=True):
            arrays = shards.shard_avals(leaf_update, g, p, shape)
            found.append((leaf_update.group, None if leaf_update.frozen else unsupported_reason(*arrays)))

    jax.eval_shape(find_reasons, grads, state, params)
    return found


def _after_step(update, state, params):
    """The new state after ``update.after_step``, with which `jadam.record` adds its statistics."""
    return state if update.after_step is None else update.after_step(state, params)


def step_sharded(tx, grads, state, params, mesh, specs):
    """`step` on a mesh, where each device updates its shard of every leaf.

    The leaf updates are made from global arrays, so that a norm is that of all gradients.

    Args:
        tx, grads, state, params: as for `step`, global arrays.
        mesh: `jax.sharding.Mesh`.
        specs: a `PartitionSpec` per leaf, with an entry for each dimension.
    """
    update = update_of(tx)
    leaf_updates, rebuild_state = update.leafwise(grads, state, params)
    leaves, structure = jax.tree.flatten(params)
    leaves, arrays = step_on_mesh(leaf_updates, jax.tree.leaves(grads), leaves, mesh, specs)
    params = structure.unflatten(leaves)
    return params, _after_step(update, rebuild_state(arrays), params)
