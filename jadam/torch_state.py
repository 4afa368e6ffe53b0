"""Convert states from and to PyTorch's Adam, as flat NumPy arrays or a safetensors file. Nothing is unpickled.

For each parameter the flat form has ``NAME.exp_avg``, ``NAME.exp_avg_sq``, ``NAME.step`` and, with ``amsgrad=True``,
``NAME.max_exp_avg_sq``. These lines of PyTorch write it, for any number of parameter groups::

    name_of = {p: name for name, p in model.named_parameters()}
    order = [name_of[p] for group in optimizer.param_groups for p in group["params"]]  # as state_dict counts them
    saved = optimizer.state_dict()["state"]
    flat = {f"{order[i]}.{key}": torch.as_tensor(x).contiguous() for i in saved for key, x in saved[i].items()}
    safetensors.torch.save_file(flat, path)

These lines read it back, with the same ``order``::

    flat = safetensors.torch.load_file(path)
    state = {i: {} for i in range(len(order))}
    for key, x in flat.items():
        name, _, entry = key.rpartition(".")
        state[order.index(name)][entry] = x
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

If you have a checkpoint but no model, take ``saved`` from the checkpoint (``torch.load`` with ``weights_only=True``)
and use ``i`` as the name.

Supported are the states of ``torch.optim.Adam``, ``AdamW`` and ``RAdam`` (`jadam.adam`, `jadam.adamw`, `jadam.radam`).
``Adam`` and ``AdamW`` with ``amsgrad=True`` are `jadam.amsgrad` with ``max_of="v"``; its default keeps another maximum
in a state that looks the same. PyTorch's state contains neither the parameters nor the hyperparameters. The parameters
need the same changes of layout as their moments. For the ``weight_decay`` of ``torch.optim.Adam``, put
`optax.add_decayed_weights` before `jadam.adam`.
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
from jadam._core.trees import find_states, leaf_name
from jadam._moments import formats
from jadam._transformation.transformation import ScheduledBetasState

#: Layout of the weight of a ``torch.nn.Linear``, with ``jax_array = torch_array.transpose(layout)``.
LINEAR = (1, 0)
#: Layout of the weight of a ``torch.nn.Conv1d``.
CONV1D = (2, 1, 0)
#: Layout of the weight of a ``torch.nn.Conv2d``.
CONV2D = (2, 3, 1, 0)

_ENTRIES = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
_SCALES = ("mu_scale", "nu_scale")
_CHECKSUM = "jadam.checksum"  # metadata key in the files of to_torch
_MAX_COUNT = np.iinfo(np.int32).max  # at which count saturates
_DAMAGED = "The file is damaged: copy or write it again."


def from_torch(source, state, names):
    """Fill ``state`` with the moments and the step count of PyTorch's Adam.

    Args:
        source: the flat form as a dict of arrays, or the path of a ``.safetensors`` file. ``step`` may be floating or
            integer.
        state: the state to fill, from ``tx.init(params)``: of `jadam.adam` and its relatives or Optax's, with moments
            of any format, in chains and wrappers such as `jadam.exact_bf16`.
        names: a dict from the path of each leaf with moments, such as ``"['dense']['kernel']"``, to its name in
            PyTorch, or to ``(name, layout)``. `jadam.describe` prints the paths. ``layout`` is a tuple of axes with
            ``jax = torch.transpose(layout)``: `LINEAR` for the weight of a Linear, `CONV1D`, `CONV2D`.

    Returns:
        A state with the structure, shapes, dtypes and shardings of ``state``. float32 moments are bit for bit
        PyTorch's, others are rounded as in a step. Step counts of schedules, for example of the learning rate, are set
        too. ``count`` saturates at 2147483647. The rest of ``state`` is unchanged: averages, accumulated gradients,
        remainders.

    Raises:
        ValueError: a list of all mismatches: leaves without a name; names without a leaf; entries that are missing,
            superfluous, of another shape or not floating; steps that differ or are not whole numbers; betas that follow
            a schedule, whose product is not in PyTorch's state. Or ``source`` is not a safetensors file, is truncated,
            or has another checksum than `to_torch` wrote. Files from PyTorch have no checksum.
        TypeError: ``source`` or ``names`` has another type.
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
    leaves, problems = _match_names(state, names)
    if find_states(state, ScheduledBetasState):
        problems.append(
            "state must have constant betas, got betas that follow a schedule (or nadam's momentum_decay), whose "
            "product is not in PyTorch's state"
        )
    known = {key for leaf in leaves for key in leaf.keys}
    for leaf in leaves:
        problems += _check_entries(leaf, entries)
    problems += [f"{key} matches no leaf in names{_amsgrad_hint(key)}" for key in entries if key not in known]
    steps = {int(entries[x.step]): x.step for x in reversed(leaves) if _is_step(entries.get(x.step))}
    if len(steps) > 1:
        differing = ", ".join(f"{step} ({key})" for step, key in sorted(steps.items()))
        problems.append(f"steps must be equal, because jadam has one count, got {differing}. Set them to one value")
    _raise_problems("from_torch", problems)
    count = min(*steps, _MAX_COUNT)
    filled = {formats.leaf_name(leaf.path): _encode(leaf, entries, count) for leaf in leaves}

    def fill(node):
        """Return one state with PyTorch's moments and count."""
        if not (has_moments(node) or _is_schedule_state(node)):
            return node
        fields = {"count": jax.tree.map(lambda old: _cast_like(np.int32(count), old), node.count)}
        for i, field in enumerate(_array_fields(node)):
            structure = jax.tree.structure(getattr(node, field))
            fields[field] = structure.unflatten([filled[formats.leaf_name(path)][i] for path, _ in _leaf_arrays(node)])
        return node._replace(**fields)

    return jax.tree.map(fill, state, is_leaf=lambda x: has_moments(x) or _is_schedule_state(x))


def to_torch(state, names, path=None) -> dict[str, np.ndarray]:
    """Convert a state to the flat form, for PyTorch's Adam.

    Args:
        state: see `from_torch`; int8 and bfloat16 moments are decoded.
        names: see `from_torch`.
        path: a ``.safetensors`` file to write as well, with a checksum that `from_torch` verifies. If writing fails, an
            existing file is unchanged.

    Returns:
        A dict of contiguous arrays in PyTorch's layouts. Moments are float32, or float64 if they are in ``state``.
        ``step`` is a float32 scalar, as in PyTorch, so exact up to 2**24.

    Raises:
        ValueError: a list of all leaves without a name and names without a leaf; or ``path`` does not end in
            ``.safetensors``.
        TypeError: ``names`` has another type.
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
    leaves, problems = _match_names(state, names)
    _raise_problems("to_torch", problems)
    flat = {}
    for leaf in leaves:
        moments = leaf.format.decode(leaf.stored, at_least_float32(*leaf.stored))
        for key, x in zip(leaf.moments, moments, strict=True):
            flat[key] = np.array(np.asarray(x).transpose(leaf.inverse), order="C")  # safetensors ignores strides
        flat[leaf.step] = np.array(leaf.count, np.float32)
    if path is not None and safetensors is not None:
        try:
            with atomic_replace(path) as scratch:
                safetensors.numpy.save_file(flat, scratch, {_CHECKSUM: _checksum(flat)})
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"path: cannot write {path}: {reason}. An existing file is unchanged.") from error
    return flat


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The moments of one parameter, and its names in PyTorch."""

    path: Any
    name: str  # of the parameter in PyTorch
    layout: tuple[int, ...]
    entries: list[str]  # PyTorch's names of the moments
    arrays: tuple[jax.Array, ...]  # in the order of `_array_fields`
    count: Any

    @property
    def moments(self) -> list[str]:
        """PyTorch's names of the moments."""
        return [f"{self.name}.{x}" for x in self.entries]

    @property
    def step(self) -> str:
        """PyTorch's name of the step count."""
        return f"{self.name}.step"

    @property
    def keys(self) -> list[str]:
        """PyTorch's names of all entries."""
        return [*self.moments, self.step]

    @property
    def format(self) -> formats.Format:
        """The format of the stored moments."""
        return formats.format_of(self.arrays)

    @property
    def stored(self) -> tuple[jax.Array, ...]:
        """The arrays without placeholders."""
        return self.arrays[: self.format.num_arrays(len(self.entries))]

    @property
    def inverse(self) -> tuple[int, ...]:
        """``torch = jax.transpose(inverse)``."""
        return tuple(sorted(range(len(self.layout)), key=self.layout.__getitem__))

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape in PyTorch's layout."""
        return tuple(self.arrays[0].shape[axis] for axis in self.inverse)


def _is_schedule_state(x) -> bool:
    """Whether ``x`` is the step count of a schedule: learning rate, weight decay or an injected hyperparameter."""
    return getattr(x, "_fields", None) == ("count",)


def _array_fields(node) -> list[str]:
    """The fields of an Adam's state with an array for each parameter, moments first."""
    return [x for x in (*_ENTRIES, *_SCALES) if x in node._fields and has_moments(node)]


def _leaf_arrays(node) -> list[tuple[Any, tuple[jax.Array, ...]]]:
    """The path of each parameter, and its arrays in the order of `_array_fields`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(node.mu)]
    columns = [jax.tree.leaves(getattr(node, field)) for field in _array_fields(node)]
    return list(zip(paths, zip(*columns, strict=True), strict=True))


def _match_names(state, names) -> tuple[list[_Leaf], list[str]]:
    """The leaves with a valid name, and a list of problems with the others."""
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names must be a dict from leaf paths to names in PyTorch, got {checks.short_repr(names)} of type "
            f"{type(names).__name__}."
        )
    leaves, problems, seen, owner = [], [], set(), {}
    for node in find_states(state, has_moments):
        if hasattr(node, "version"):
            checks.check_version(node, formats.VERSION, convertible=1)
        count = jax.tree.leaves(node.count)[0]
        entries = [_ENTRIES[x] for x in _array_fields(node) if x in _ENTRIES]
        for path, arrays in _leaf_arrays(node):
            leaf = formats.leaf_name(path)
            if leaf in seen:
                problems.append(f"{leaf!r} has moments in two places of state, in PyTorch only in one")
                continue
            seen.add(leaf)
            if leaf not in names:
                problems.append(f"{leaf!r} of shape {arrays[0].shape} is not in names")
                continue
            name, layout = _parse_name(names[leaf], arrays[0].ndim)
            if name is None or layout is None:
                problems.append(
                    f"names[{leaf!r}] must be a name in PyTorch or (name, layout) with a permutation of the "
                    f"{arrays[0].ndim} axes, got {names[leaf]!r}"
                )
                continue
            if jnp.iscomplexobj(arrays[0]):
                problems.append(f"{leaf!r} must be real, got {arrays[0].dtype} (PyTorch's exp_avg_sq is then complex)")
                continue
            if name in owner:
                problems.append(f"names gives {name!r} to both {owner[name]!r} and {leaf!r}")
                continue
            owner[name] = leaf
            leaves.append(_Leaf(path, name, layout, entries, arrays, count))
    if not seen:
        problems.append("state must have the moments of an Adam (count, mu, nu), found none")
    problems += [f"names has {leaf!r}, but state has no moments for it" for leaf in names if leaf not in seen]
    return leaves, problems


def _parse_name(value, ndim: int) -> tuple[str | None, tuple[int, ...] | None]:
    """The name and layout of an entry of ``names``, ``(None, None)`` if it is invalid."""
    match value:
        case str(name):
            return name, tuple(range(ndim))
        case (str(name), [*axes]) if all(type(x) is int for x in axes) and sorted(axes) == list(range(ndim)):
            return name, tuple(axes)
    return None, None


def _check_entries(leaf: _Leaf, entries) -> list[str]:
    """Problems with the entries of ``leaf``."""
    problems = []
    for key in leaf.keys:
        x, is_step = entries.get(key), key == leaf.step
        shape = () if is_step else leaf.torch_shape
        if x is None:
            problems.append(f"{key} is missing{_amsgrad_hint(key)}")
        elif x.shape != shape:
            target = f"{formats.leaf_name(leaf.path)!r} of shape {leaf.arrays[0].shape} and layout {leaf.layout}"
            problems.append(f"{key} must have shape {shape} for {target}, got {x.shape}")
        elif is_step and not _is_step(x):
            problems.append(f"{key} must be a whole number >= 0, got {x} of {x.dtype}")
        elif not (is_step or jnp.issubdtype(x.dtype, jnp.floating)):
            problems.append(f"{key} must be floating, got {x.dtype}")
    return problems


def _amsgrad_hint(key: str) -> str:
    """A sentence on AMSGrad for an entry that only it has, else nothing."""
    return (
        ". Only amsgrad has it: use jadam.amsgrad(max_of='v') here and amsgrad=True in PyTorch"
        if key.endswith(".max_exp_avg_sq")
        else ""
    )


def _is_step(x) -> bool:
    """Whether ``x`` is an array of shape () with an integer >= 0; False for None."""
    if x is None or x.shape or not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        return False
    return bool(np.isfinite(x)) and x >= 0 and int(x) == x


def _encode(leaf: _Leaf, entries, count: int) -> list[jax.Array]:
    """The arrays of ``leaf`` with PyTorch's moments, rounded as in the step that led to ``count``."""
    to_jax = lambda key: np.array(entries[key].transpose(leaf.layout))  # a copy: on a CPU JAX may alias NumPy's memory
    moments = [_put_like(to_jax(key), leaf.arrays[0]) for key in leaf.moments]
    count_before = jnp.asarray(max(count - 1, 0), jnp.uint32)
    random = formats.random_bits(moments[0].shape, formats.leaf_salt(leaf_name(leaf.path)), count_before)
    new = leaf.format.encode(moments, leaf.stored, random)
    return [_cast_like(x, old) for x, old in zip((*new, *leaf.arrays[len(new) :]), leaf.arrays, strict=True)]


def _cast_like(x, old) -> jax.Array:
    """``x`` with the dtype and sharding of ``old``."""
    return _put_like(jnp.asarray(x, old.dtype), old)


def _put_like(x, old) -> jax.Array:
    """``x`` on the devices of ``old``; uncommitted if ``old`` is, or the next jitted step would recompile."""
    if getattr(old, "committed", False):
        return jax.device_put(x, old.sharding)
    x = jnp.asarray(x)
    sharding = getattr(old, "sharding", x.sharding)  # NumPy arrays have none
    return x if x.sharding == sharding else jax.device_put(x, sharding)  # the mesh has changed since old was made


def _raise_problems(function: str, problems: list[str]) -> None:
    """Raise one error with all ``problems``, if there are any."""
    if problems:
        raise ValueError("\n".join([f"{function} found {len(problems)} problem(s):", *problems]))


def _load(source) -> dict[str, np.ndarray]:
    """Return the arrays of a dict or of a .safetensors file, whose checksum is verified."""
    if isinstance(source, Mapping):
        return {str(key): np.asarray(x) for key, x in source.items()}
    path, safetensors = _safetensors_path("source", source), _safetensors()
    try:
        flat = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, framework="numpy") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
    except safetensors.SafetensorError as error:
        raise ValueError(f"source must be a safetensors file, got {str(path)!r}: {error}. {_DAMAGED}") from error
    if expected is not None and _checksum(flat) != expected:
        raise ValueError(
            f"source must have the checksum {expected} that to_torch wrote, got {_checksum(flat)} in {str(path)!r}. "
            f"{_DAMAGED}"
        )
    return flat


def _checksum(flat: dict[str, np.ndarray]) -> str:
    """`jadam.checksum` in hexadecimal."""
    return f"{int(checksum(flat)):08x}"


def _safetensors_path(name: str, path) -> Path:
    """``path`` as a `Path`; raises unless it ends in .safetensors, because other files may be pickles."""
    if not isinstance(path, (str, os.PathLike)):
        kinds = "a dict of arrays or the path of a .safetensors file" if name == "source" else "a path"
        raise TypeError(f"{name} must be {kinds}, got {checks.short_repr(path)} of type {type(path).__name__}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{name} must end in .safetensors, got {str(path)!r}. Pickles are not supported: convert the file in "
            "PyTorch, see help(jadam.torch_state)."
        )
    return path


def _safetensors():
    """Import safetensors; raise with the command that installs it."""
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "from_torch and to_torch need safetensors for .safetensors files: pip install safetensors."
        ) from error
    return safetensors
