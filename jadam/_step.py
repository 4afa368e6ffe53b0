"""Parameters and moments in one pass over memory, where a kernel serves; elsewhere Optax's two calls.

`step` binds one primitive for the whole tree. What becomes of it is decided when it is lowered for a platform, so
compilation ahead of time and `jax.export` choose by their target: a kernel where one is active, otherwise
``tx.update`` and `optax.apply_updates`, which is also what `jax.vmap` and differentiation see.
"""

import functools

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec

from jadam import _checks, _kernels
from jadam._kernels import cpu, pallas
from jadam._leaf import update_leaf
from jadam._numerics import apply_updates
from jadam._transformation import NotOnePass, Part, Plan, Step, Transformation, planned


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
    if isinstance(tx, Transformation):
        for tree, what in ((grads, "grads"), (state, "state"), (params, "params")):
            _checks.values(tree, what)
        _checks.together(grads=grads, state=state, params=params)
    reason, closed_over = _look(tx, grads, state, params)
    if reason is not None:
        return two_calls(tx, grads, state, params)
    if closed_over:
        return _with_operands(tx, grads, state, params)
    return _bind(tx, grads, state, params, two_calls)


def _bind(tx, grads, state, params, otherwise):
    flat, tree = jax.tree.flatten((grads, state, params))
    grads, state, params = tree.unflatten(map(jnp.asarray, flat))
    out = step_p.bind(*jax.tree.leaves((grads, state, params)), tx=tx, tree=tree, otherwise=otherwise)
    return jax.tree.unflatten(jax.tree.structure((params, state)), out)


def two_calls(tx, grads, state, params):
    """What `step` amounts to."""
    updates, state = tx.update(grads, state, params)
    return apply_updates(params, updates), state


def obstacle(tx, grads, state, params) -> str | None:
    """Why `step` must be two calls whatever the platform, or None. Raises what the plan's checks raise."""
    return _look(tx, grads, state, params)[0]


def _look(tx, grads, state, params) -> tuple[str | None, bool]:
    """`obstacle`, and whether the plan closes over traced values, as a traced learning rate is one."""
    if not isinstance(tx, Transformation):
        return "none of jadam's optimizers; a chain must be jadam.chain", False

    def plan(grads, state, params):
        return _without_scalars(tx.plan(grads, state, params).jobs)[0]

    if params is None:
        raise ValueError("step needs params: call step(tx, grads, state, params).")
    try:
        traced = jax.make_jaxpr(plan)(grads, state, params)
    except NotOnePass as reason:
        return str(reason), False
    return None, any(isinstance(x, jax.core.Tracer) for x in traced.consts)


def outlook(platform, tx, grads, state, params) -> list[tuple[str, str | None]]:
    """For every leaf its rule of `jadam.by_path`, and why it takes a platform more than one pass, or None.

    Kernels are taken to be active.
    """
    found = []
    refuses = cpu.refuses if platform == "cpu" else functools.partial(pallas.refuses, platform)

    def plan(grads, state, params):
        jobs = tx.plan(grads, state, params).jobs
        for job, g, p in zip(jobs, jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
            found.append((job.group, None if job.frozen else refuses(job, g, p)))

    jax.eval_shape(plan, grads, state, params)
    return found


def by_jobs(kernel, tx, grads, state, params):
    """``kernel(jobs, grads, params)`` gives ``(p, stored)`` for the leaves it takes and None for those left to XLA."""
    jobs, finish = tx.plan(grads, state, params)
    leaves, structure = jax.tree.flatten(params)
    grads = jax.tree.leaves(grads)
    done = kernel(jobs, grads, leaves)
    rows = [update_leaf(*x) if y is None else y for y, *x in zip(done, jobs, grads, leaves, strict=True)]
    return observed(tx, structure.unflatten([p for p, _ in rows]), finish([stored for _, stored in rows]))


def observed(tx, params, state):
    """The new parameters and the new state, in which `jadam.record` may have written."""
    after_step = tx.info.after_step
    return params, state if after_step is None else after_step(state, params)


def by_xla(tx, grads, state, params):
    """A plan's jobs without a kernel."""
    return by_jobs(lambda jobs, grads, params: [None] * len(jobs), tx, grads, state, params)


def in_parts(tx, grads, state, params, mesh, specs, first):
    """`step` on a mesh, in parts: ``specs`` divide the leaves, ``first(shape, spec, mesh)`` is where a part begins.

    The plan is of whole arrays, so that a norm is that of all gradients; each device then does its parts of the jobs.
    """
    jobs, finish = tx.plan(grads, state, params)
    grads, (leaves, structure) = jax.tree.leaves(grads), jax.tree.flatten(params)
    scalars, owned, local = _replanned(jobs, leaves)
    shapes = [p.shape for p in leaves]

    def body(scalars, owned, grads, params):
        firsts = [first(shape, spec, mesh) for shape, spec in zip(shapes, specs, strict=True)]
        params, (_, owned, _) = _bind(local, grads, (scalars, owned, firsts), params, by_xla)
        return params, owned

    of_owned = [jax.tree.map(lambda _, spec=spec: spec, x) for x, spec in zip(owned, specs, strict=True)]
    leaves, owned = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), of_owned, specs, specs),
        out_specs=(specs, of_owned),
        check_vma=False,
    )(scalars, owned, grads, leaves)
    return observed(tx, structure.unflatten(leaves), finish(_stored(owned)))


def _with_operands(tx, grads, state, params):
    """`step` where the plan closes over traced values, which the primitive must be given."""
    jobs, finish = tx.plan(grads, state, params)
    scalars, owned, local = _replanned(jobs, jax.tree.leaves(params))
    params, (_, owned, _) = _bind(local, grads, (scalars, owned, [None] * len(jobs)), params, by_xla)
    return observed(tx, params, finish(_stored(owned)))


def _replanned(jobs, params):
    """The scalars of jobs and what is stored, and a transformation with a state of these and of where parts begin."""
    scalars, rebuilt = _without_scalars(jobs)
    shapes = [jnp.shape(p) for p in params]

    def plan(updates, state, params):
        scalars, owned, firsts = state
        del updates, params
        parts = [None if first is None else Part(first, shape) for first, shape in zip(firsts, shapes, strict=True)]
        here = [
            job._replace(stored=stored, remainder=remainder, part=part)
            for job, (stored, remainder), part in zip(rebuilt(scalars), owned, parts, strict=True)
        ]

        def done(stored):
            pairs = zip(stored, owned, strict=True)
            return scalars, [(x, None) if r is None else (x[1:], x[0]) for x, (_, r) in pairs], firsts

        return Plan(here, done)

    return scalars, [(job.stored, job.remainder) for job in jobs], planned(None, plan)  # nobody calls its init


def _stored(owned):
    """What `Plan.finish` takes."""
    return [x if r is None else (r, *x) for x, r in owned]


def _without_scalars(jobs):
    """The arrays among the scalars of jobs, each once, and a function that from such arrays makes the jobs.

    It holds no array itself: a traced one would outlive its trace in the primitive's parameters.
    """
    names = ("minus_lr", "weight_decay", "bound", "norm", "max_norm", "count")
    distinct = {id(job.step): job.step for job in jobs}
    order = {key: i for i, key in enumerate(distinct)}
    step_of = [order[id(job.step)] for job in jobs]
    steps = [step and vars(step) for step in distinct.values()]  # in the jobs' order, which is that of every process
    values = (steps, [[getattr(job, name) for name in names] for job in jobs])
    flat, tree = jax.tree.flatten(values)
    given = {id(x): x for x in flat if isinstance(x, jax.Array)}
    place = {key: i for i, key in enumerate(given)}
    places = [place.get(id(x)) for x in flat]
    constants = [x if i is None else None for x, i in zip(flat, places, strict=True)]
    bare = [job._replace(step=None, stored=(), remainder=None, **dict.fromkeys(names)) for job in jobs]

    def rebuilt(arrays):
        flat = [x if i is None else arrays[i] for x, i in zip(constants, places, strict=True)]
        steps, others = tree.unflatten(flat)
        steps = [values and Step(**values) for values in steps]
        return [
            job._replace(step=steps[i], **dict(zip(names, values, strict=True)))
            for job, i, values in zip(bare, step_of, others, strict=True)
        ]

    return list(given.values()), rebuilt


step_p = Primitive("jadam_step")
step_p.multiple_results = True


def _flat(function, *args, tx, tree):
    return jax.tree.leaves(function(tx, *tree.unflatten(args)))


@step_p.def_abstract_eval
def _(*avals, tx, tree, otherwise):
    _, state, params = tree.unflatten(avals)
    return [x.strip_weak_type() for x in jax.tree.leaves((params, state))]


@functools.lru_cache(maxsize=256)
def _eager(**how):
    return jax.jit(functools.partial(step_p.bind, **how))


@step_p.def_impl
def _(*args, **how):
    with jax.disable_jit(False):  # else what is compiled would come back here for ever
        return _eager(**how)(*args)


def _lowering(platform="", kernel=None):
    """The rule for a platform: ``kernel`` where it is active and the array whole, else ``otherwise``."""

    def rule(ctx, *args, tx, tree, otherwise):
        serves = kernel is not None and _kernels.backends()[platform].kernel is not None and _whole(ctx)
        function = functools.partial(by_jobs, kernel) if serves else otherwise
        return mlir.lower_fun(functools.partial(_flat, function), multiple_results=True)(ctx, *args, tx=tx, tree=tree)

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


def _batch(args, dims, *, tx, tree, otherwise):
    out = jax.vmap(functools.partial(_flat, otherwise, tx=tx, tree=tree), in_axes=dims)(*args)
    return out, [0] * len(out)


def _jvp(primals, tangents, *, tx, tree, otherwise):
    tangents = map(ad.instantiate_zeros, tangents)
    function = functools.partial(_flat, otherwise, tx=tx, tree=tree)
    out, tangents = jax.jvp(function, tuple(primals), tuple(tangents))
    is_zero = lambda t: t.dtype == jax.dtypes.float0
    return out, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if is_zero(t) else t for x, t in zip(out, tangents, strict=True)
    ]


batching.primitive_batchers[step_p] = _batch
ad.primitive_jvps[step_p] = _jvp
