"""The state of PyTorch's Adam in and out, as flat NumPy arrays or a safetensors file. Nothing is ever unpickled.

The flat form has for each parameter ``NAME.exp_avg``, ``NAME.exp_avg_sq``, ``NAME.step`` and, with ``amsgrad=True``,
``NAME.max_exp_avg_sq``. These lines of PyTorch write it, whatever the optimizer's groups::

    name_of = {p: name for name, p in model.named_parameters()}
    order = [name_of[p] for group in optimizer.param_groups for p in group["params"]]  # as state_dict counts them
    saved = optimizer.state_dict()["state"]
    flat = {f"{order[i]}.{key}": torch.as_tensor(x).contiguous() for i in saved for key, x in saved[i].items()}
    safetensors.torch.save_file(flat, path)

and, with ``order`` from above, these read it back::

    flat = safetensors.torch.load_file(path)
    state = {i: {} for i in range(len(order))}
    for key, x in flat.items():
        name, _, entry = key.rpartition(".")
        state[order.index(name)][entry] = x
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

Where there is a checkpoint but no model, ``saved`` is in it (``torch.load`` with ``weights_only=True``), and ``i`` will
do for a name.

What carries over is the state of ``torch.optim.Adam``, ``AdamW`` and ``RAdam`` (`jadam.adam`, `jadam.adamw`,
`jadam.radam`), and of the first two with ``amsgrad=True`` (`jadam.amsgrad` with ``max_of="v"``: its default keeps
another maximum, in a state that looks the same). Not in PyTorch's state are the parameters, which change layout as
their moments do, and the hyperparameters; the ``weight_decay`` of ``torch.optim.Adam`` is `optax.add_decayed_weights`
before `jadam.adam`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jadam._checkpoints.checksum import checksum
from jadam._checkpoints.convert import has_moments
from jadam._core import checks
from jadam._core.files import atomic_replace
from jadam._core.numerics import at_least_float32
from jadam._core.trees import find_states
from jadam._moments import formats
from jadam._transformation.transformation import ScheduledBetasState

# layout: the axes for which jax = torch.transpose(layout)
LINEAR = (1, 0)
CONV1D = (2, 1, 0)
CONV2D = (2, 3, 1, 0)

_ENTRIES = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
_SCALES = ("mu_scale", "nu_scale")
_CHECKSUM = "jadam.checksum"  # in the metadata of a file that to_torch wrote
_LAST = np.iinfo(np.int32).max  # where count stays


def from_torch(source, state, names):
    """``state`` with the moments and the step of PyTorch's Adam.

    Args:
        source: the flat form as a dict of arrays, or the path of a ``.safetensors`` file. ``step`` may be floating or
            integer.
        state: the state to fill, from ``tx.init(params)``: of `jadam.adam` and its relatives or Optax's, with moments
            of any format, in chains and wrappers such as `jadam.exact_bf16`.
        names: for each leaf that has moments, by the path that `jadam.describe` prints, such as
            ``"['dense']['kernel']"``, PyTorch's name of it, or ``(name, layout)``, where ``layout`` is the tuple of
            axes with ``jax = torch.transpose(layout)``: `LINEAR` for the weight of a Linear, `CONV1D`, `CONV2D`.

    Returns:
        A state like ``state`` in structure, shapes, dtypes and shardings. float32 moments are PyTorch's to the bit,
        others are rounded as a step rounds them. Schedules, of the learning rate for one, stand at PyTorch's step too.
        ``count`` saturates at 2147483647. What else is in ``state`` stays: averages, sums of gradients, remainders.

    Raises:
        ValueError: with all that does not fit: leaves without a name, names without a leaf, entries that are missing,
            left over, misshapen or not floating, steps that differ or are no whole numbers, betas that follow a
            schedule, whose product PyTorch's state does not hold. Or ``source`` is another kind of file, a truncated
            one, or one by `to_torch` whose arrays are not those written; PyTorch writes nothing to tell that by.
        TypeError: ``source`` or ``names`` of another type.
        ImportError: ``source`` is a file and safetensors is not installed.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jadam
        >>> from jadam import torch_state
        >>> saved = {"fc.weight.exp_avg": np.ones((3, 2)), "fc.weight.exp_avg_sq": np.ones((3, 2)), "fc.weight.step": 7}
        >>> state = jadam.adam(1e-3).init({"kernel": jnp.zeros((2, 3))})
        >>> names = {"['kernel']": ("fc.weight", torch_state.LINEAR)}
        >>> state = torch_state.from_torch(saved, state, names)
        >>> print(state[0].count, state[0].mu["kernel"].shape)
        7 (2, 3)
    """
    entries = _load(source)
    leaves, problems = _leaves(state, names)
    if find_states(state, ScheduledBetasState):
        problems.append(
            "state must have constant betas, got betas that follow a schedule (or nadam's momentum_decay), whose "
            "product is not in PyTorch's state"
        )
    known = {key for leaf in leaves for key in leaf.wanted}
    for leaf in leaves:
        problems += _misfits(leaf, entries)
    problems += [f"{key} belongs to no leaf in names{_hint(key)}" for key in entries if key not in known]
    first = {int(entries[x.step]): x.step for x in reversed(leaves) if _is_step(entries.get(x.step))}
    if len(first) > 1:
        differing = ", ".join(f"{step} ({key})" for step, key in sorted(first.items()))
        problems.append(f"steps must be equal, for jadam has one count, got {differing}. Give them one value")
    _raise("from_torch", problems)
    count = min(*first, _LAST)
    filled = {formats.leaf_name(leaf.path): _encoded(leaf, entries, count) for leaf in leaves}

    def fill(part):
        if not (has_moments(part) or _is_count(part)):
            return part
        trees = {"count": jax.tree.map(lambda old: _like(np.int32(count), old), part.count)}
        for i, field in enumerate(_fields(part)):
            structure = jax.tree.structure(getattr(part, field))
            trees[field] = structure.unflatten([filled[formats.leaf_name(path)][i] for path, _ in _rows(part)])
        return part._replace(**trees)

    return jax.tree.map(fill, state, is_leaf=lambda x: has_moments(x) or _is_count(x))


def to_torch(state, names, path=None) -> dict[str, np.ndarray]:
    """The flat form of a state, for PyTorch's Adam.

    Args:
        state: see `from_torch`; int8 and bfloat16 moments are decoded.
        names: see `from_torch`.
        path: of a ``.safetensors`` file to write as well, with a checksum that `from_torch` verifies. If that fails, an
            older file is left as it was.

    Returns:
        A dict of contiguous arrays in PyTorch's layouts: the moments float32, float64 where they are; ``step`` a
        float32 scalar, as PyTorch keeps it, so exact up to 2**24.

    Raises:
        ValueError: leaves without a name, names without a leaf, all at once; or ``path`` does not end in
            ``.safetensors``.
        TypeError: ``names`` of another type.
        OSError: the file cannot be written.
        ImportError: ``path`` is given and safetensors is not installed.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> from jadam import torch_state
        >>> state = jadam.adam(1e-3).init({"kernel": jnp.zeros((2, 3))})
        >>> flat = torch_state.to_torch(state, {"['kernel']": ("fc.weight", torch_state.LINEAR)})
        >>> print({key: x.shape for key, x in flat.items()})
        {'fc.weight.exp_avg': (3, 2), 'fc.weight.exp_avg_sq': (3, 2), 'fc.weight.step': ()}
    """
    path, safetensors = (None, None) if path is None else (_safetensors_path("path", path), _safetensors())
    leaves, problems = _leaves(state, names)
    _raise("to_torch", problems)
    flat = {}
    for leaf in leaves:
        moments = leaf.format.decode(leaf.stored, at_least_float32(*leaf.stored))
        for key, x in zip(leaf.moments, moments, strict=True):
            flat[key] = np.array(np.asarray(x).transpose(leaf.inverse), order="C")  # safetensors takes it as it lies
        flat[leaf.step] = np.array(leaf.count, np.float32)
    if path is not None and safetensors is not None:
        try:
            with atomic_replace(path) as scratch:
                safetensors.numpy.save_file(flat, scratch, {_CHECKSUM: _checksum(flat)})
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"path: cannot write {path}: {reason}. What was there is as it was.") from error
    return flat


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The moments of one parameter, and what PyTorch calls them."""

    path: Any
    name: str  # PyTorch's
    layout: tuple[int, ...]
    entries: list[str]  # PyTorch's, of the moments
    arrays: tuple[jax.Array, ...]  # of `_fields`
    count: Any

    @property
    def moments(self) -> list[str]:
        return [f"{self.name}.{x}" for x in self.entries]

    @property
    def step(self) -> str:
        return f"{self.name}.step"

    @property
    def wanted(self) -> list[str]:
        return [*self.moments, self.step]

    @property
    def format(self) -> formats.Format:
        return formats.format_of(self.arrays)

    @property
    def stored(self) -> tuple[jax.Array, ...]:
        """The arrays that the format uses; the others only fill a place."""
        return self.arrays[: self.format.num_arrays(len(self.entries))]

    @property
    def inverse(self) -> tuple[int, ...]:
        """``torch = jax.transpose(inverse)``."""
        return tuple(sorted(range(len(self.layout)), key=self.layout.__getitem__))

    @property
    def torch_shape(self) -> tuple[int, ...]:
        return tuple(self.arrays[0].shape[axis] for axis in self.inverse)


def _is_count(x) -> bool:
    """A schedule's state: of the learning rate, the weight decay or an injected hyperparameter."""
    return getattr(x, "_fields", None) == ("count",)


def _fields(part) -> list[str]:
    """The fields with an array for every parameter, moments first."""
    return [x for x in (*_ENTRIES, *_SCALES) if x in part._fields and has_moments(part)]


def _rows(part) -> list[tuple[Any, tuple[jax.Array, ...]]]:
    """Every parameter's path, and its arrays in the order of `_fields`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(part.mu)]
    columns = [jax.tree.leaves(getattr(part, field)) for field in _fields(part)]
    return list(zip(paths, zip(*columns, strict=True), strict=True))


def _leaves(state, names) -> tuple[list[_Leaf], list[str]]:
    """The leaves that have a name, and what is wrong with the others."""
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names must be a dict from leaf paths to PyTorch's names, got {checks.short_repr(names)} of type "
            f"{type(names).__name__}."
        )
    leaves, problems, seen, owner = [], [], set(), {}
    for part in find_states(state, has_moments):
        count = jax.tree.leaves(part.count)[0]
        entries = [_ENTRIES[x] for x in _fields(part) if x in _ENTRIES]
        for path, arrays in _rows(part):
            leaf = formats.leaf_name(path)
            if leaf in seen:
                problems.append(f"{leaf!r} has moments in two places of state; PyTorch's has one")
                continue
            seen.add(leaf)
            if leaf not in names:
                problems.append(f"{leaf!r}, of shape {arrays[0].shape}, is not in names")
                continue
            name, layout = _named(names[leaf], arrays[0].ndim)
            if name is None or layout is None:
                problems.append(
                    f"names[{leaf!r}] must be PyTorch's name or (name, layout), layout a permutation of the "
                    f"{arrays[0].ndim} axes, got {names[leaf]!r}"
                )
                continue
            if jnp.iscomplexobj(arrays[0]):
                problems.append(
                    f"{leaf!r} must be real, got {arrays[0].dtype}, of which PyTorch's exp_avg_sq has two parts"
                )
                continue
            if name in owner:
                problems.append(f"names gives {name!r} to both {owner[name]!r} and {leaf!r}")
                continue
            owner[name] = leaf
            leaves.append(_Leaf(path, name, layout, entries, arrays, count))
    if not seen:
        problems.append("state must hold moments of Adam (count, mu and nu), found none")
    problems += [f"names has {leaf!r}, but no such leaf has moments in state" for leaf in names if leaf not in seen]
    return leaves, problems


def _named(value, ndim: int) -> tuple[str | None, tuple[int, ...] | None]:
    """Name and layout of an entry of ``names``; None what is neither."""
    match value:
        case str(name):
            return name, tuple(range(ndim))
        case (str(name), [*axes]) if all(type(x) is int for x in axes) and sorted(axes) == list(range(ndim)):
            return name, tuple(axes)
    return None, None


def _misfits(leaf: _Leaf, entries) -> list[str]:
    """What is wrong with the entries of ``leaf``."""
    problems = []
    for key in leaf.wanted:
        x, is_step = entries.get(key), key == leaf.step
        shape = () if is_step else leaf.torch_shape
        if x is None:
            problems.append(f"{key} is missing{_hint(key)}")
        elif x.shape != shape:
            where = f"{formats.leaf_name(leaf.path)!r} of shape {leaf.arrays[0].shape} and layout {leaf.layout}"
            problems.append(f"{key} must have shape {shape}, for {where}, got {x.shape}")
        elif is_step and not _is_step(x):
            problems.append(f"{key} must be a whole number >= 0, got {x} of {x.dtype}")
        elif not (is_step or jnp.issubdtype(x.dtype, jnp.floating)):
            problems.append(f"{key} must be floating, got {x.dtype}")
    return problems


def _hint(key: str) -> str:
    only = ", which only amsgrad has: jadam.amsgrad(max_of='v') here and amsgrad=True in PyTorch"
    return only if key.endswith(".max_exp_avg_sq") else ""


def _is_step(x) -> bool:
    """Whether ``x`` is an array that holds one whole number >= 0."""
    if x is None or x.shape or not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        return False
    return bool(np.isfinite(x)) and x >= 0 and int(x) == x


def _encoded(leaf: _Leaf, entries, count: int) -> list[jax.Array]:
    """The arrays of ``leaf`` with PyTorch's moments in them, stored as by the step that led to ``count``."""
    own = lambda key: np.array(entries[key].transpose(leaf.layout))  # on a CPU JAX may go on using NumPy's memory
    moments = [_placed(own(key), leaf.arrays[0]) for key in leaf.moments]
    taken = jnp.asarray(max(count - 1, 0), jnp.uint32)
    random = lambda k: formats.random_bits(moments[0].shape, formats.leaf_salt(leaf.path), taken)(k)
    new = leaf.format.encode(moments, leaf.stored, random)
    return [_like(x, old) for x, old in zip((*new, *leaf.arrays[len(new) :]), leaf.arrays, strict=True)]


def _like(x, old) -> jax.Array:
    """``x`` with the dtype of ``old``, where that is."""
    return _placed(jnp.asarray(x, old.dtype), old)


def _placed(x, old) -> jax.Array:
    """``x`` where ``old`` is; uncommitted if that is, or the next jitted step would be compiled again."""
    if getattr(old, "committed", False):
        return jax.device_put(x, old.sharding)
    x = jnp.asarray(x)
    sharding = getattr(old, "sharding", x.sharding)  # a NumPy array has none
    return x if x.sharding == sharding else jax.device_put(x, sharding)  # another mesh is set than when old was made


def _raise(function: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join([f"{function} found {len(problems)} problem(s):", *problems]))


def _load(source) -> dict[str, np.ndarray]:
    if isinstance(source, Mapping):
        return {str(key): np.asarray(x) for key, x in source.items()}
    path, safetensors = _safetensors_path("source", source), _safetensors()
    try:
        flat = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except safetensors.SafetensorError as error:
        raise ValueError(f"source must be a whole safetensors file, got {str(path)!r}: {error}. {_AGAIN}") from error
    if expected is not None and _checksum(flat) != expected:
        raise ValueError(
            f"source must have the arrays that to_torch wrote, of checksum {expected}, got {str(path)!r} with "
            f"{_checksum(flat)}. {_AGAIN}"
        )
    return flat


_AGAIN = "The file is damaged: copy or write it again."


def _checksum(flat: dict[str, np.ndarray]) -> str:
    return f"{int(checksum(flat)):08x}"


def _safetensors_path(name: str, path) -> Path:
    """``path``, which could be a pickle if it did not end so."""
    if not isinstance(path, (str, os.PathLike)):
        kinds = "a dict of arrays or the path of a .safetensors file" if name == "source" else "a path"
        raise TypeError(f"{name} must be {kinds}, got {checks.short_repr(path)} of type {type(path).__name__}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{name} must end in .safetensors, got {str(path)!r}. Nothing is unpickled here: write the file in PyTorch "
            "with the lines in help(jadam.torch_state)."
        )
    return path


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "A .safetensors file needs safetensors, which is not there: pip install safetensors."
        ) from error
    return safetensors
