"""Kernels on sharded arrays under plain `jax.jit`: every device updates its own shards.

XLA's partitioner cannot look into a kernel. `jax.experimental.custom_partitioning` tells it, by a Shardy rule, how the
arrays may be sharded, and asks back for the program of one device when all shardings are known. The rule: a parameter,
its gradient and its state arrays are sharded alike, and int8 scales as the blocks are. Scalars are replicated.

JAX refuses `custom_partitioning` in a traced program with two meshes, or with a mesh without devices. Here it is called
when the primitive is lowered. JAX then needs only the number of devices, and gets stand-ins for them.
"""

import dataclasses
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import jadam
from jadam._core.meshes import in_no_mesh
from jadam._fused.backends import warn_once
from jadam._fused.shards import leaf_arrays_of
from jadam._moments.int8 import Int8CutBlocks, int8_of_shards
from jadam._transformation.transformation import LeafUpdate, Operands, Shard, as_state_arrays, pack, unpack

PLATFORMS = ("cpu", "cuda")  # TPU: https://github.com/jax-ml/jax/issues/38196
AXIS = "devices"  # of the mesh of all devices, in which the program of one device runs
LEAVES_PER_CALL = 16  # as many as a kernel takes on a CPU


def why_not_partitioned(ctx, platform: str) -> str | None:
    """Return why a kernel cannot be partitioned in the program that is being lowered, or None."""
    module = ctx.module_context
    if platform not in PLATFORMS:
        return f"JAX cannot partition a kernel on {platform}"
    if module.lowering_parameters.for_export:
        return "jax.export cannot save a partitioned kernel"
    if not jax.config.jax_use_shardy_partitioner:  # pyright: ignore[reportAttributeAccessIssue]
        return "jax_use_shardy_partitioner is off"
    if not hasattr(module.axis_context, "num_devices"):
        return "only some mesh axes are manual"
    return None


def warn_of_cut_blocks(cut: list) -> None:
    """Log once that shards cut int8 blocks. ``cut`` has the name, shape and shard shape of each such leaf."""
    if cut:
        (name, shape, shard_shape), *others = cut
        more = " and others" if others else ""
        warn_once(
            f"jadam.step is slow for {name}{more}: its shards, {shard_shape} of {shape}, cut its int8 blocks. Make the "
            "state with jadam.sharding.sharded(tx, params, mesh), or with tx.init outside of jit, which fit the blocks "
            "to the shards.",
            key="cut blocks",
        )


class _NotPickled:
    """Keeps an object alive, which is left out when a compiled program is pickled."""

    def __init__(self, kept):
        """``kept`` is the object."""
        self.kept = kept

    def __reduce__(self):
        """Pickle any other object."""
        return object, ()


def with_stand_in_devices(ctx):
    """The context of a lowering rule with stand-ins for its devices.

    The compiled program keeps what `custom_partitioning` needs while XLA compiles, which cannot be pickled. So that
    `jax.experimental.serialize_executable` can save the program, this is not pickled.
    """
    axis_context = ctx.module_context.axis_context
    devices = tuple(jax.devices()[:1]) * axis_context.num_devices
    axis_context = dataclasses.replace(axis_context, device_assignment=devices)
    keepalives: list = []
    ctx.module_context.add_keepalive(_NotPickled(keepalives))
    return ctx.replace(module_context=ctx.module_context.replace(axis_context=axis_context, keepalives=keepalives))


def update_partitioned(
    has_kernel: list[bool], step_shards, num_devices, leaf_updates: list[LeafUpdate], grads, params
) -> list[tuple | None]:
    """Return the new parameter and the new state arrays of each leaf, or None where no kernel supports it.

    Args:
        has_kernel: whether a kernel supports each leaf.
        step_shards: ``step_shards(leaf_updates, grads, params)`` updates the shards of one device.
        num_devices: the number of devices.
        leaf_updates, grads, params: of all leaves, global arrays.
    """
    results: list = [None] * len(leaf_updates)
    supported = [i for i, has in enumerate(has_kernel) if has]
    for start in range(0, len(supported), LEAVES_PER_CALL):
        group = supported[start : start + LEAVES_PER_CALL]
        columns = ([column[i] for i in group] for column in (leaf_updates, grads, params))
        for i, result in zip(group, _partitioned(step_shards, num_devices, *columns), strict=True):
            results[i] = result
    return results


def _partitioned(step_shards, num_devices, leaf_updates: list[LeafUpdate], grads, params):
    """Yield the new parameter and the new state arrays of each leaf, updated by one call of `custom_partitioning`."""
    shapes = [p.shape for p in params]
    blocks = [leaf_update.block for leaf_update in leaf_updates]
    settings, operands = pack(leaf_updates)
    scalars = [_digest(settings, blocks), *operands.scalars]
    arrays, treedef = jax.tree.flatten((operands.leaf_arrays, grads, params))
    # The compiled program keeps the functions below, so they must not hold arrays that are traced now.
    names, num_scalars = [leaf_update.name for leaf_update in leaf_updates], len(operands.scalars)
    places, _, _ = treedef.unflatten(range(len(arrays)))

    def whole(scalars, *arrays):
        """Stands for the results on whole arrays: only their shapes and dtypes are used."""
        leaf_arrays, _, params = treedef.unflatten(arrays)
        return _flat(params, map(as_state_arrays, leaf_arrays))

    def rule(mesh, operand_types, result_types):
        """Return the Shardy rule: which dimensions are sharded alike."""
        rules = [_factors(f"x{k}_", *x, num_devices) for k, x in enumerate(zip(shapes, blocks, strict=True))]
        of_params = [elements for elements, _, _ in rules]
        of_scales = [scales for _, scales, _ in rules]
        of_state = list(map(leaf_arrays_of, places, blocks, of_params, of_scales))
        return SdyShardingRule(
            (ArrayMapping("digest"), *[ArrayMapping()] * num_scalars, *_flat(of_state, of_params, of_params)),
            tuple(_flat(of_params, map(as_state_arrays, of_state))),
            **{name: size for _, _, sizes in rules for name, size in sizes.items()},
        )

    def partition(mesh, args, results):
        """Choose each leaf's sharding. Return the program of one device, and the shardings it needs."""
        scalar_args, *array_args = args
        leaf_args, _, param_args = treedef.unflatten(array_args)
        tilings = [_choose_tiling(*x) for x in zip(leaf_args, param_args, strict=True)]
        cut = [block is not None and x.cuts(block) for x, block in zip(tilings, blocks, strict=True)]
        warn_of_cut_blocks(
            [(name, x.shape, x.shard_shape) for name, x, is_cut in zip(names, tilings, cut, strict=True) if is_cut]
        )

        def update_shards(scalars, *arrays):
            """The program of one device."""
            leaf_arrays, grads, params = treedef.unflatten(arrays)
            leaf_updates = unpack(settings, Operands(scalars[1:], leaf_arrays))
            device = jax.lax.axis_index(AXIS)
            for i, (tiling, block, is_cut) in enumerate(zip(tilings, blocks, cut, strict=True)):
                leaf_update = leaf_updates[i]._replace(shard=Shard(jnp.asarray(tiling.offsets)[device], tiling.shape))
                if block is not None and is_cut:
                    first_column = jnp.asarray(tiling.first_columns)[device]
                    max_across_row = functools.partial(jax.lax.pmax, axis_name=AXIS, axis_index_groups=tiling.rows)
                    format = Int8CutBlocks(block, tiling.shape[-1], first_column, max_across_row)
                    leaf_update = leaf_update._replace(format=format)
                elif block is not None:
                    leaf_update = leaf_update._replace(format=int8_of_shards(block))
                leaf_updates[i] = leaf_update
            new_params, new_arrays = step_shards(leaf_updates, grads, params)
            return _flat(new_params, new_arrays)

        flat_mesh = AbstractMesh((tilings[0].num_devices,), (AXIS,))
        replicated = NamedSharding(flat_mesh, PartitionSpec())
        of_params = [x.sharding for x in tilings]
        of_scales = [x.sharding_of_rows if is_cut else x.sharding for x, is_cut in zip(tilings, cut, strict=True)]
        of_state = list(map(leaf_arrays_of, places, blocks, of_params, of_scales))
        return (
            flat_mesh,
            in_no_mesh(update_shards),
            _flat(of_params, map(as_state_arrays, of_state)),
            ([replicated] * len(scalar_args), *_flat(of_state, of_params, of_params)),
        )

    call = custom_partitioning(whole)
    call.def_partition(partition, decode_shardings=False, sharding_rule=rule)
    results = iter(call(scalars, *arrays))
    new_params = [next(results) for _ in params]
    for p, leaf_arrays in zip(new_params, operands.leaf_arrays, strict=True):
        yield p, tuple(next(results) for _ in as_state_arrays(leaf_arrays))


def _flat(*trees) -> list:
    """The leaves of several trees of lists and tuples, which may be arrays, shardings or rules of arrays."""
    return jax.tree.leaves(tuple(map(list, trees)), is_leaf=lambda x: isinstance(x, ArrayMapping))


def _factors(prefix: str, shape, block: int | None, num_devices: int):
    """The Shardy factors of a leaf: those of its dimensions, those of its scales' dimensions, and sizes."""
    names = [f"{prefix}{axis}" for axis in range(len(shape))]
    if block is None:
        return ArrayMapping(*names), None, {}
    *rows, last = names
    num_blocks, rest = divmod(shape[-1], block)
    if rest or num_blocks % num_devices:
        return ArrayMapping(*names), ArrayMapping(*rows, f"{last}s"), {}
    elements = ArrayMapping(*rows, CompoundFactor(f"{last}s", f"{last}e"))
    return elements, ArrayMapping(*rows, f"{last}s"), {f"{last}e": block}


def _digest(settings, blocks) -> np.ndarray:
    """A hash of all that the program of one device depends on beside its arguments.

    XLA's cache of compiled programs sees the operands of a partitioned call, but not this program. The program of
    another version of jadam may not fit this version's kernel.
    """
    rules = [(x.rule.function.__module__, x.rule.function.__qualname__) for x in settings.leaf_updates]
    leaves = [(x.format.name, str(x.dtype), x.salt) for x in settings.leaf_updates]
    text = repr(
        (jadam.__version__, rules, leaves, blocks, settings[1:])
    )  # the tree of the scalars tells which operations there are
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)


class _Tiling:
    """How an array is cut into shards, one or more devices having each."""

    def __init__(self, array):
        """``array`` has a shape and a sharding of JAX's that holds a device assignment of XLA's."""
        self.shape, self.sharding = array.shape, array.sharding
        self.num_devices = array.sharding.num_devices
        hlo = array.sharding._to_xla_hlo_sharding(len(array.shape))
        dims = [1] * len(self.shape) if hlo.is_replicated() else hlo.tile_assignment_dimensions()[: len(self.shape)]
        devices = range(self.num_devices) if hlo.is_replicated() else hlo.tile_assignment_devices()
        self.dims = tuple(dims)  # the number of shards along each dimension
        self.devices = np.reshape(devices, (*dims, -1))  # of each shard

    @property
    def shard_shape(self) -> tuple[int, ...]:
        """The shape of a shard, with padding."""
        return tuple(-(-size // n) for size, n in zip(self.shape, self.dims, strict=True))

    def cuts(self, block: int) -> bool:
        """Whether a shard does not hold whole blocks of the last dimension."""
        return self.dims[-1] > 1 and (self.shape[-1] % self.dims[-1] != 0 or self.shard_shape[-1] % block != 0)

    def _first_index(self, strides) -> np.ndarray:
        """For each device: its shard's first index along each dimension, times ``strides``, summed modulo 2**32."""
        of_shards = np.zeros(self.dims, np.uint64)
        for place, n, stride in zip(np.indices(self.dims, np.uint64), self.shard_shape, strides, strict=True):
            of_shards += place * np.uint64(n * stride % 2**32)
        of_devices = np.empty(self.num_devices, np.uint32)
        of_devices[self.devices] = of_shards[..., None].astype(np.uint32)
        return of_devices

    @property
    def offsets(self) -> np.ndarray:
        """The index of the first element of each device's shard in the whole array."""
        return self._first_index([math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))])

    @property
    def first_columns(self) -> np.ndarray:
        """The first index of each device's shard along the last dimension."""
        return self._first_index([*[0] * (len(self.shape) - 1), 1])

    @property
    def rows(self) -> list[list[int]]:
        """Groups of devices that differ only in the place of their shards along the last dimension."""
        return np.moveaxis(self.devices, -2, -1).reshape(-1, self.dims[-1]).tolist()

    @property
    def sharding_of_rows(self):
        """The sharding with the last dimension replicated."""
        hlo = self.sharding._to_xla_hlo_sharding(len(self.shape)).to_proto()
        hlo.tile_assignment_dimensions = [*self.dims[:-1], 1, self.devices.shape[-1] * self.dims[-1]]
        hlo.tile_assignment_devices = self.devices.ravel().tolist()
        hlo.iota_reshape_dims, hlo.iota_transpose_perm = [], []
        hlo.replicate_on_last_tile_dim, hlo.last_tile_dims = True, []
        return type(self.sharding)(self.sharding._internal_device_list, hlo)


def _choose_tiling(leaf_arrays, p) -> _Tiling:
    """The tiling with the most shards among those of the state arrays and the parameter.

    Where the user shards only the state (ZeRO), shards of the parameter are updated, then gathered.
    """
    stored, remainder = leaf_arrays
    like_param = [x for x in (*stored, remainder, p) if x is not None and x.shape == p.shape]
    return max(map(_Tiling, like_param), key=lambda tiling: math.prod(tiling.dims))
