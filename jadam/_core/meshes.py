"""Meshes with explicit axes, where the types of arrays say how they are sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


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
