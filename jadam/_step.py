"""Parameters and moments in one pass over memory, where a kernel serves; elsewhere Optax's two calls.

`step` makes the plan where it is called, so that schedules are called there and scalars are arrays, and binds one
primitive for all leaves: arrays in, arrays out, its settings hashable. What becomes of it is decided when it is lowered
for a platform, so compilation ahead of time and `jax.export` choose by their target: a kernel where one is active,
otherwise XLA, which is also what `jax.vmap` and differentiation see.
"""

import functools

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jadam import _checks, _kernels
from jadam._kernels import cpu, pallas
from jadam._leaf import update_leaf
from jadam._numerics import apply_updates
from jadam._transformation import NotOnePass, Operands, Transformation, pack, unpack, what_is_stored


def step(tx: optax.GradientTransformation, grads, state, params):
    """``tx.update`` and `optax.apply_updates` in one pass over memory.

    Memory traffic is what Adam costs: at best 28 bytes per float32 parameter, read and written once. The two calls are
    two passes at least on a CPU.

    One pass, for jadam's optimizers, `jadam.chain` and `jadam.exact_bf16` around them: on a CPU by a compiled kernel,
    see `jadam.backends`; on GPU and TPU by XLA in float32, and by a kernel in Pallas where XLA would take several, as
    for int8 moments. Anything else, and any leaf that no kernel takes, is done by the two calls or what they amount to;
    `jadam.describe` tells which and why. On several devices the kernels serve with `jadam.sharding.zero1` and inside
    `jax.shard_map`; otherwise XLA shards the two calls.

    Args:
        tx: any Optax transformation. One that needs more than gradients, state and parameters has no place here.
        grads: gradients, a tree like ``params``.
        state: of ``tx``.
        params: parameters.

    Returns:
        ``(params, state)``. Donate both and take them in that order, as below: then the kernels work in place. JAX
        gives the first donated array of a shape to the first result of that shape; in another order XLA must copy.

    Raises:
        ValueError: arrays on different devices, or donated to an earlier step; and what ``tx.update`` raises.
        TypeError: a leaf that is no array; and what ``tx.update`` raises.

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
    _checks.transformation("step needs", tx)
    if (own := getattr(tx.update, "step", None)) is not None:  # of jadam.sharding.zero1
        return own(grads, state, params)
    if not isinstance(tx, Transformation):
        return two_calls(tx, grads, state, params)
    for tree, what in ((grads, "grads"), (state, "state"), (params, "params")):
        _checks.values(tree, what)
    _checks.together(grads=grads, state=state, params=params)
    if params is None:
        raise ValueError("step needs params: call step(tx, grads, state, params).")
    try:
        return by_plan(_bind, tx, grads, state, params)
    except NotOnePass:
        return two_calls(tx, grads, state, params)


def by_plan(take, tx, grads, state, params):
    """`step` where ``take(settings, operands, grads, params)`` does what is planned, on lists of leaves."""
    jobs, finish = tx.plan(grads, state, params)
    leaves, structure = jax.tree.flatten(params)
    leaves, stored = take(*pack(jobs), jax.tree.leaves(grads), leaves)
    return _after_step(tx, structure.unflatten(leaves), finish(stored))


def _bind(settings, operands, grads, params):
    """The new parameters and what is stored, for lists of leaves."""
    flat, tree = jax.tree.flatten((operands, grads, params))
    params, stored = jax.tree.unflatten(
        _results(tree, flat), step_p.bind(*map(jnp.asarray, flat), settings=settings, tree=tree)
    )
    # Times 1, which XLA leaves out: checkify looks for NaN behind operations that it knows, such as a product.
    return [p * np.ones([], p.dtype) if _is_traced(p) else p for p in params], stored


def _results(tree, flat):
    """The structure of the primitive's results."""
    operands, _, params = tree.unflatten(flat)
    return jax.tree.structure((params, list(map(what_is_stored, operands.owned))))


def _is_traced(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def two_calls(tx, grads, state, params):
    """What `step` amounts to."""
    updates, state = tx.update(grads, state, params)
    return apply_updates(params, updates), state


def obstacle(tx, grads, state, params) -> str | None:
    """Why `step` must be two calls whatever the platform, or None. Raises what the plan's checks raise."""
    if not isinstance(tx, Transformation):
        return "none of jadam's optimizers; a chain must be jadam.chain"

    def plan(grads, state, params):
        return pack(tx.plan(grads, _with_known_counts(state), params).jobs)[1]

    try:
        jax.eval_shape(plan, grads, state, params)
    except NotOnePass as reason:
        return str(reason)
    return None


def _with_known_counts(state):
    """``state`` with NumPy's 0 for every count, so that schedules get a number where all else is traced."""
    is_count = lambda x: jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jax.tree.map(lambda x: np.zeros([], x.dtype) if is_count(x) else x, state)


def outlook(platform, tx, grads, state, params) -> list[tuple[str, str | None]]:
    """For every leaf its rule of `jadam.by_path`, and why it takes a platform more than one pass, or None.

    Kernels are taken to be active.
    """
    found = []
    refuses = cpu.refuses if platform == "cpu" else functools.partial(pallas.refuses, platform)

    def plan(grads, state, params):
        jobs = tx.plan(grads, _with_known_counts(state), params).jobs
        for job, g, p in zip(jobs, jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
            found.append((job.group, None if job.frozen else refuses(job, g, p)))

    jax.eval_shape(plan, grads, state, params)
    return found


def _after_step(tx, params, state):
    """The new parameters and the new state, in which `jadam.record` may have written."""
    after_step = tx.info.after_step
    return params, state if after_step is None else after_step(state, params)


def in_parts(tx, grads, state, params, mesh, specs, first):
    """`step` on a mesh, in parts: ``specs`` divide the leaves, ``first(shape, spec, mesh)`` is where a part begins.

    The plan is of whole arrays, so that a norm is that of all gradients; each device then does its parts of the jobs.
    """
    jobs, finish = tx.plan(grads, state, params)
    grads, (leaves, structure) = jax.tree.leaves(grads), jax.tree.flatten(params)
    shapes = [p.shape for p in leaves]
    settings, operands = pack(jobs, shapes)

    def body(operands, grads, params):
        firsts = [first(shape, spec, mesh) for shape, spec in zip(shapes, specs, strict=True)]
        return _bind(settings, operands._replace(firsts=firsts), grads, params)

    of_owned = [jax.tree.map(lambda _, spec=spec: spec, x) for x, spec in zip(operands.owned, specs, strict=True)]
    of_operands = Operands(jax.tree.map(lambda _: PartitionSpec(), operands.scalars), of_owned, None)
    of_stored = list(map(what_is_stored, of_owned))
    leaves, stored = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(of_operands, specs, specs),
        out_specs=(specs, of_stored),
        check_vma=False,
    )(operands, grads, leaves)
    return _after_step(tx, structure.unflatten(leaves), finish(stored))


def by_jobs(kernel, settings, operands, grads, params):
    """``kernel(jobs, grads, params)`` gives ``(p, stored)`` for the leaves it takes and None for those left to XLA."""
    jobs = unpack(settings, operands)
    done = kernel(jobs, grads, params)
    rows = [update_leaf(*x) if y is None else y for y, *x in zip(done, jobs, grads, params, strict=True)]
    return [p for p, _ in rows], [stored for _, stored in rows]


def by_xla(settings, operands, grads, params):
    """The jobs without a kernel."""
    return by_jobs(lambda jobs, grads, params: [None] * len(jobs), settings, operands, grads, params)


step_p = Primitive("jadam_step")
step_p.multiple_results = True


def _flat(function, *args, settings, tree):
    return jax.tree.leaves(function(settings, *tree.unflatten(args)))


@step_p.def_abstract_eval
def _(*avals, settings, tree):
    del settings
    operands, _, params = tree.unflatten(avals)
    return [x.strip_weak_type() for x in jax.tree.leaves((params, list(map(what_is_stored, operands.owned))))]


@functools.lru_cache(maxsize=256)
def _compiled(settings, tree):
    """The primitive under jit; by XLA's operations one by one where JAX looks for the one that made a NaN."""

    def run(*args):
        traced = any(map(_is_traced, args))
        bind = step_p.bind if traced else functools.partial(_flat, by_xla)
        return bind(*args, settings=settings, tree=tree)

    return jax.jit(run)


@step_p.def_impl
def _(*args, settings, tree):
    with jax.disable_jit(False):  # else what is compiled would come back here for ever
        return _compiled(settings, tree)(*args)


def _lowering(platform="", kernel=None):
    """The rule for a platform: ``kernel`` where it is active and the array whole, else XLA."""

    def rule(ctx, *args, settings, tree):
        serves = kernel is not None and _kernels.backends()[platform].kernel is not None and _whole(ctx)
        function = functools.partial(_flat, functools.partial(by_jobs, kernel) if serves else by_xla)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args, settings=settings, tree=tree)

    return rule


def _whole(ctx) -> bool:
    """Whether a call sees all of its arrays: one device, or every axis of the mesh is manual as within `jax.shard_map`.

    Otherwise XLA's partitioner would gather what an opaque call gets.
    """
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


mlir.register_lowering(step_p, _lowering())
mlir.register_lowering(step_p, _lowering("cpu", cpu.kernel), platform="cpu")
for name in pallas.PLATFORMS:
    mlir.register_lowering(step_p, _lowering(name, functools.partial(pallas.kernel, name)), platform=name)


def _batch(args, dims, *, settings, tree):
    out = jax.vmap(functools.partial(_flat, by_xla, settings=settings, tree=tree), in_axes=dims)(*args)
    return out, [0] * len(out)


def _jvp(primals, tangents, *, settings, tree):
    tangents = map(ad.instantiate_zeros, tangents)
    function = functools.partial(_flat, by_xla, settings=settings, tree=tree)
    out, tangents = jax.jvp(function, tuple(primals), tuple(tangents))
    is_zero = lambda t: t.dtype == jax.dtypes.float0
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if is_zero(t) else t for x, t in zip(out, tangents, strict=True)
    ]


batching.primitive_batchers[step_p] = _batch
ad.primitive_jvps[step_p] = _jvp
