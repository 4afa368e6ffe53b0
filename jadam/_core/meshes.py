"""Meshes on which arrays lie. Over explicit axes, the types of arrays say how they are sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jadam._core import checks
from jadam._core.trees import params_tree


def explicit_mesh(arrays):
    """The mesh of arrays if some of its axes are explicit, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def call_with_auto_axes(f: Callable[..., Any], *args, like=None) -> Any:
    """``f(*args)``, where explicit axes of the mesh are made ``Auto``, so that XLA chooses the shardings within ``f``.

    Otherwise JAX refuses arrays of several shardings, and replicates every iota. The results get the shardings of
    ``like``, a tree of arrays. Default: they are replicated.
    """
    mesh = explicit_mesh(jax.tree.leaves(args))
    if mesh is None:
        return f(*args)
    shardings = NamedSharding(mesh, PartitionSpec())
    if like is not None:
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), like)
    return jax.sharding.auto_axes(f, axes=mesh.explicit_axes, out_sharding=shardings)(*args)


def mesh_of(params) -> Mesh | AbstractMesh:
    """The mesh on which parameters lie. Raises unless there is exactly one."""
    meshes = find_meshes(params)
    if not meshes:
        raise ValueError(
            "params must have a jax.sharding.NamedSharding, got none that has one. Put them on the mesh with "
            "jax.device_put(params, shardings), or pass jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
        )
    if len(meshes) > 1:
        raise ValueError(
            f"params must lie on one mesh, got {len(meshes)}: {dict(meshes[0].shape)} and {dict(meshes[1].shape)}. "
            "Put them on one with jax.device_put."
        )
    return meshes[0]


def find_meshes(params) -> list[Mesh | AbstractMesh]:
    """The meshes on which parameters lie."""
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(params_tree(params))]
    return list(dict.fromkeys(x.mesh for x in shardings if isinstance(x, NamedSharding)))


def in_no_mesh(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, traced outside of the mesh that `jax.set_mesh` has set."""

    def wrapper(*args):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return f(*args)

    return wrapper


def mesh_axes(axis, mesh) -> tuple[str, ...]:
    """Return ``axis`` as a tuple of axis names; raise unless they are axes of the mesh."""
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    if not axes or any(not isinstance(name, str) or name not in mesh.shape for name in axes):
        raise ValueError(
            f"axis must be one or several of the mesh axes {tuple(mesh.shape)}, got {checks.short_repr(axis)}."
        )
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis must name each mesh axis once, got {axis!r}.")
    return axes
