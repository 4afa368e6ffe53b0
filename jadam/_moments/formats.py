"""Storage formats for the moments of one leaf: float32 and bfloat16. `jadam._moments.int8` has the third, int8.

Formats and update rules are independent. A step decodes a leaf's stored arrays to moments of at least float32, applies
the rule, and encodes the new moments. To add a format, write a class like these and add it to `FORMATS`.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.numerics import at_least_float32, dither, linear_index, real, round_to_bfloat16
from jadam._core.trees import leaf_name
from jadam._moments.int8 import Int8

FormatName = Literal["float32", "bfloat16", "int8"]
FormatChoice = FormatName | jax.typing.DTypeLike | Callable[[str, Any], FormatName | jax.typing.DTypeLike]


@dataclasses.dataclass(frozen=True)
class Random:
    """Random bits of a leaf's elements, for the step after ``count`` others. For ``salt`` see `leaf_salt`."""

    index: jax.Array  # the elements' `linear_index`
    salt: int
    count: jax.Array

    def bits(self, k: int) -> jax.Array:
        """uint32 for every element; ``k`` numbers independent streams."""
        return dither(self.index, self.salt, self.count, k)


class Format(Protocol):
    """A storage format for the moments of one leaf."""

    name: str
    stochastic: bool  # whether encoding needs random bits

    def unsupported_reason(self, p) -> str | None:
        """Why moments of a leaf like ``p`` cannot have this format, or None if they can."""
        ...

    def matches(self, stored: Sequence[jax.Array]) -> bool:
        """Whether ``stored`` is in this format, if no earlier one of `FORMATS` matches; float32 matches all."""
        ...

    def num_arrays(self, num_moments: int) -> int:
        """The number of arrays for ``num_moments``: one for each, and one for its scales if the format has scales."""
        ...

    def init(self, p, num_moments: int) -> tuple[jax.Array, ...]:
        """The stored arrays of zero moments of a leaf ``p``. All moments but the first are real."""
        ...

    def nan_if_unsupported(self, hp) -> Any:
        """Return ``hp``, with NaN for ``b1`` where its values do not allow this format: compiled code cannot raise."""
        ...

    def decode(self, stored: Sequence[jax.Array], dtype) -> tuple[jax.Array, ...]:
        """The moments, the first in ``dtype``, the others in its real counterpart."""
        ...

    def encode(self, moments: Sequence[jax.Array], stored: Sequence[jax.Array], random: Random) -> tuple:
        """The stored arrays of ``moments``, with the shapes and dtypes of ``stored``, the previous ones."""
        ...


class Float32:
    """Unchanged moments: 4 bytes each per parameter, 8 for float64."""

    name = "float32"
    stochastic = False

    def __init__(self, mu_dtype=None):
        """``mu_dtype``: dtype of the first moment. Default: the parameter's, at least float32."""
        self.mu_dtype = mu_dtype

    def unsupported_reason(self, p) -> str | None:
        return None

    def matches(self, stored):
        return True  # asked last, see FORMATS

    def num_arrays(self, num_moments):
        return num_moments

    def init(self, p, num_moments):
        dtype = at_least_float32(p)
        dtypes = [self.mu_dtype or dtype] + [real(dtype)] * (num_moments - 1)
        return tuple(jnp.zeros_like(p, dtype=x) for x in dtypes)

    def nan_if_unsupported(self, hp):
        return hp

    def decode(self, stored, dtype):
        first, *others = stored
        return first.astype(dtype), *(x.astype(real(dtype)) for x in others)

    def encode(self, moments, stored, random):
        return tuple(x.astype(s.dtype) for x, s in zip(moments, stored, strict=True))  # mu_dtype may be narrower


class BFloat16(Float32):
    """Moments in bfloat16 with stochastic rounding: 2 bytes each per parameter.

    With rounding to nearest, a second moment stops updating once a step changes it by less than half of bfloat16's
    spacing: at b2 = 0.999 its error reaches a half. Stochastic rounding is unbiased, with a root mean square error of
    0.3 %.
    """

    name = "bfloat16"
    stochastic = True

    def unsupported_reason(self, p):
        dtype = at_least_float32(p)
        return None if dtype == np.float32 else f"{dtype} moments are not compressed"

    def matches(self, stored):
        return stored[1].dtype == jnp.bfloat16  # mu_dtype=jnp.bfloat16 is for the first only

    def init(self, p, num_moments):
        return tuple(jnp.zeros_like(p, dtype=jnp.bfloat16) for _ in range(num_moments))

    def encode(self, moments, stored, random):
        moments = [x.astype(jnp.float32) for x in moments]
        return tuple(round_to_bfloat16(x, random.bits(k)) for k, x in enumerate(moments))


FORMATS: dict[str, Format] = {format.name: format for format in (Int8(), BFloat16(), Float32())}  # in matching order


def format_of(stored: Sequence[jax.Array]) -> Format:
    """The format of stored arrays: int8 or bfloat16 by the dtype of the second array, otherwise float32."""
    return next(format for format in FORMATS.values() if format.matches(stored))


def by_name_or_function(moments):
    """The argument ``moments`` with a dtype, such as ``jnp.int8``, replaced by its name."""
    return np.dtype(moments).name if isinstance(moments, (type, np.dtype)) else moments


def format_selector(moments: FormatChoice, mu_dtype, betas: dict | None) -> Callable[[Any, Any], Format]:
    """A function from a leaf's path and the leaf to its format.

    Args:
        moments: the name of a format or its dtype, or a function ``f(path, leaf)`` that returns one.
        mu_dtype: dtype of the first moment in the float32 format, or None.
        betas: the decay rates of Adam's rule, checked for int8; None if int8 is not allowed.
    """
    formats = FORMATS | {"float32": Float32(mu_dtype)}

    def by_name(name, source="moments"):
        """Return the format ``name``; raise if it is unknown or does not fit ``mu_dtype`` or ``betas``."""
        name = by_name_or_function(name)
        if not (isinstance(name, str) and name in formats):
            raise ValueError(
                f"{source} must be {' or '.join(map(repr, sorted(formats)))}"
                f"{' or a function f(path, leaf) that returns one of them' * (source == 'moments')}, "
                f"got {checks.short_repr(name)}.{checks.did_you_mean(name, formats)}"
            )
        if name != "float32" and mu_dtype is not None:
            raise ValueError(f"mu_dtype must be None with moments={name!r}, got {mu_dtype}. Drop mu_dtype.")
        if name == "int8":
            Int8.check(betas)
        return formats[name]

    moments = by_name_or_function(moments)
    if not callable(moments):
        wanted = by_name(moments)
        return lambda path, p: formats["float32"] if wanted.unsupported_reason(p) else wanted
    if mu_dtype is not None:
        raise ValueError(f"mu_dtype must be None when moments is a function, got {mu_dtype}. Drop mu_dtype.")

    def choose(path, p):
        """Return the format of a leaf: what ``moments`` returns, or float32 if that does not support the leaf."""
        name = leaf_name(path)
        wanted = by_name(moments(name, p), f"moments({name!r}, leaf)")
        return formats["float32"] if wanted.unsupported_reason(p) else wanted

    return choose


def random_bits(shape, salt: int, count, index=None) -> Random:
    """The `Random` of a leaf. ``index`` is its `linear_index` if the leaf is a part of an array."""
    return Random(linear_index(shape) if index is None else index, salt, count.astype(jnp.uint32))


def leaf_salt(name: str) -> int:
    """A 32-bit hash of a leaf's name, which distinguishes its random bits from other leaves'."""
    return zlib.crc32(name.encode())


VERSION = 2  # of the layout of codes and scales in a saved state


def version(number: int = VERSION) -> jax.Array:
    """An array of this length, filled with ``number - 1``.

    A length is known under jit, and every checkpoint format keeps it. The values tell it from a shorter array that was
    padded with zeros, as Orbax does with ``strict=False``.
    """
    return jnp.full(number, number - 1, jnp.int8)


def nan_if_padded(hp, version):
    """The `Hyperparams` ``hp``, NaN if a traced ``version`` was padded: compiled code cannot raise."""
    if not isinstance(version, jax.core.Tracer):
        return hp
    known = version[0].astype(jnp.int32) == VERSION - 1
    return hp.replace(b1=hp.b1._replace(correction=jnp.where(known, hp.b1.correction, jnp.nan)))


def placeholder(p, dtype=jnp.int8) -> jax.Array:
    """A one-element array, e.g. for the scales of a leaf that is not int8. Orbax cannot save empty arrays."""
    return jnp.zeros((1,) * jnp.ndim(p), dtype)


def is_placeholder(x) -> bool:
    """True for the scales of a leaf that is not int8. An int8 leaf has at least 4,096 elements, so several scales."""
    return x.size <= 1
