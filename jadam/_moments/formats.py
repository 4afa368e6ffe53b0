"""How one leaf's moments are stored between steps: as they are or in bfloat16; `jadam._moments.int8` has the third way.

A `Format` knows nothing of Adam's rule, and the rule nothing of it: a leaf's stored arrays are decoded to
moments of float32 or wider, the rule makes new ones, and they are encoded. A new format is a class like these, and a
line in `FORMATS`.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jadam._core import checks
from jadam._core.numerics import at_least_float32, dither, linear_index, real, round_to_bfloat16
from jadam._core.trees import leaf_name
from jadam._moments.int8 import Int8

Name = Literal["float32", "bfloat16", "int8"]
Moments = Name | Callable[[str, Any], Name]
Random = Callable[[int], jax.Array]  # random(k): 32 bits for every element, uint32, from the k-th stream


class Format(Protocol):
    """How the moments of one leaf are stored."""

    name: str
    stochastic: bool  # whether encoding needs random bits

    def unsupported_reason(self, p) -> str | None:
        """Why a leaf like ``p`` cannot be stored so, or None if it can."""
        ...

    def matches(self, stored: Sequence[jax.Array]) -> bool:
        """Whether ``stored`` are arrays of this format."""
        ...

    def num_arrays(self, moments: int) -> int:
        """How many arrays hold so many moments: the moments, then their scales if there are any."""
        ...

    def init(self, p, moments: int) -> tuple[jax.Array, ...]:
        """The arrays for moments of zero: the first is shaped and typed like ``p``, the others like it and real."""
        ...

    def validate(self, hp) -> Any:
        """``step`` with NaN in it where the format cannot follow its hyperparameters."""
        ...

    def decode(self, stored: Sequence[jax.Array], dtype) -> tuple[jax.Array, ...]:
        """The moments; the first in ``dtype``, the others in its real counterpart."""
        ...

    def encode(self, moments: Sequence[jax.Array], stored: Sequence[jax.Array], random: Random) -> tuple:
        """``moments`` stored again, in the shapes and dtypes of ``stored``, where they were before."""
        ...


class Float32:
    """Moments as they are: 4 bytes each per parameter, 8 for a float64 leaf."""

    name = "float32"
    stochastic = False

    def __init__(self, mu_dtype=None):
        """``mu_dtype`` is the first moment's dtype, default the parameter's, at least float32."""
        self.mu_dtype = mu_dtype

    def unsupported_reason(self, p) -> str | None:
        return None

    def matches(self, stored):
        return True  # the last of FORMATS

    def num_arrays(self, moments):
        return moments

    def init(self, p, moments):
        dtype = at_least_float32(p)
        dtypes = [self.mu_dtype or dtype] + [real(dtype)] * (moments - 1)
        return tuple(jnp.zeros_like(p, dtype=x) for x in dtypes)

    def validate(self, hp):
        return hp

    def decode(self, stored, dtype):
        first, *others = stored
        return first.astype(dtype), *(x.astype(real(dtype)) for x in others)

    def encode(self, moments, stored, random):
        return tuple(x.astype(s.dtype) for x, s in zip(moments, stored, strict=True))  # narrower with mu_dtype


class BFloat16(Float32):
    """Moments in bfloat16, rounded stochastically: 2 bytes each per parameter.

    To nearest, a second moment stops where a step changes it by less than half of bfloat16's spacing: at b2 = 0.999
    it is off by up to a half. A stochastic rounding has no bias, and 2 bytes hold a moment to 0.3 % root mean square.
    """

    name = "bfloat16"
    stochastic = True

    def unsupported_reason(self, p):
        dtype = at_least_float32(p)
        return None if dtype == np.float32 else f"{dtype} is never stored narrower than itself"

    def matches(self, stored):
        return stored[1].dtype == jnp.bfloat16  # with mu_dtype only the first is

    def init(self, p, moments):
        return tuple(jnp.zeros_like(p, dtype=jnp.bfloat16) for _ in range(moments))

    def encode(self, moments, stored, random):
        moments = [x.astype(jnp.float32) for x in moments]
        return tuple(round_to_bfloat16(x, random(k)) for k, x in enumerate(moments))


FORMATS: dict[str, Format] = {format.name: format for format in (Int8(), BFloat16(), Float32())}


def format_of(stored: Sequence[jax.Array]) -> Format:
    """The format of a leaf's arrays."""
    return next(format for format in FORMATS.values() if format.matches(stored))


def format_selector(moments: Moments, mu_dtype, betas: dict | None) -> Callable[[Any, Any], Format]:
    """The function that chooses a leaf's format from its path and itself.

    Args:
        moments: a name, or a function to names.
        mu_dtype: dtype of the first moment in float32 format, or None.
        betas: of Adam's rule, for which int8 needs a bound, or None where int8 is not allowed.
    """
    formats = FORMATS | {"float32": Float32(mu_dtype)}

    def named(name, whose="moments"):
        if not (isinstance(name, str) and name in formats):
            extra = "" if whose != "moments" else " or a function f(path, leaf) to one of these"
            raise ValueError(
                f"{whose} must be {' or '.join(map(repr, sorted(formats)))}{extra}, got {checks.shown(name)}."
            )
        if name != "float32" and mu_dtype is not None:
            raise ValueError(f"mu_dtype must be None with moments={name!r}, got {mu_dtype}. Drop mu_dtype.")
        if name == "int8":
            Int8.check(betas)
        return formats[name]

    if not callable(moments) or isinstance(moments, type):  # jnp.bfloat16 is a type
        wanted = named(moments)
        return lambda path, p: formats["float32"] if wanted.unsupported_reason(p) else wanted
    if mu_dtype is not None:
        raise ValueError(f"mu_dtype must be None where moments is a function, got {mu_dtype}. Drop mu_dtype.")

    def choose(path, p):
        name = leaf_name(path)
        wanted = named(moments(name, p), f"moments({name!r}, leaf)")
        return formats["float32"] if wanted.unsupported_reason(p) else wanted

    return choose


def random_bits(shape, salt: int, count, index=None) -> Random:
    """The random bits of a leaf at the step after ``count`` others; ``index`` is `linear_index`, or part of it."""
    index = linear_index(shape) if index is None else index
    return functools.partial(dither, index, salt, count.astype(jnp.uint32))


def salt(path) -> int:
    """What makes a leaf's random bits its own: 32 bits of its name."""
    return zlib.crc32(leaf_name(path).encode())


VERSION = 1  # of how a saved state holds codes, scales and remainders


def version() -> jax.Array:
    """`VERSION` as the length of an array: known under jit, and kept by whatever saves a state."""
    return jnp.zeros(VERSION, jnp.int8)


def placeholder(p, dtype=jnp.int8) -> jax.Array:
    """What stands in a state for what a leaf like ``p`` does not need: one element, as Orbax saves no empty array."""
    return jnp.zeros((1,) * jnp.ndim(p), dtype)


def is_placeholder(x) -> bool:
    """Whether ``x`` stands in scales for none: those of an int8 leaf, which has 4,096 elements, are more than one."""
    return x.size <= 1
