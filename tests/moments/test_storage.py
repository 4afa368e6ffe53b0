"""Each function of `jadam._moments.formats` on single arrays."""

import re
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import zeros

from jadam._core.numerics import dither, linear_index
from jadam._moments import formats
from jadam._moments.formats import FORMATS, BFloat16, Float32


def test_names():
    names = ["int8", "bfloat16", "float32"]  # the order in which `format_of` tries them; float32 matches everything
    assert list(FORMATS) == [format.name for format in FORMATS.values()] == names


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("mu_dtype", [None, jnp.bfloat16])
def test_float32(dtype, mu_dtype):
    format, p = Float32(mu_dtype), zeros((2, 3), dtype)
    wide = jnp.complex64 if dtype == jnp.complex64 else jnp.float32
    first, second, third = format.init(p, 3)
    assert (first.dtype, second.dtype, third.dtype) == (mu_dtype or wide, jnp.float32, jnp.float32)
    assert {x.shape for x in (first, second, third)} == {(2, 3)}
    assert not any(np.asarray(x).any() for x in (first, second, third))
    assert format.num_arrays(2) == 2
    assert format.unsupported_reason(p) is None
    assert format.matches((first, second))
    given = object()
    assert format.nan_if_unsupported(given) is given


def test_float32_decodes_and_encodes():
    stored = (jnp.array([1.5, 2.5], jnp.bfloat16), jnp.array([3.0, 4.0], jnp.float32))
    m, v = Float32().decode(stored, np.dtype("complex64"))
    assert (m.dtype, v.dtype) == (jnp.complex64, jnp.float32)
    assert (m.tolist(), v.tolist()) == ([1.5, 2.5], [3.0, 4.0])
    new = Float32().encode((jnp.float32([1 + 2**-9, 7]), jnp.float32([5, 6])), stored, None)
    assert [x.dtype for x in new] == [jnp.bfloat16, jnp.float32]
    assert [x.tolist() for x in new] == [[1.0, 7.0], [5.0, 6.0]]  # rounded to nearest
    with pytest.raises(ValueError, match="zip"):
        Float32().encode(new[:1], stored, None)


def test_bfloat16():
    format, p = BFloat16(), zeros((2, 3))
    assert [(x.dtype, x.shape) for x in format.init(p, 3)] == [(jnp.bfloat16, (2, 3))] * 3
    assert not any(np.asarray(x).any() for x in format.init(p, 2))
    assert format.unsupported_reason(p) is None
    assert format.unsupported_reason(zeros(2, jnp.bfloat16)) is None
    assert format.unsupported_reason(zeros(2, jnp.complex64)) == "complex64 moments are not compressed"
    narrow, wide = zeros(2, jnp.bfloat16), zeros(2)
    assert format.matches((narrow, narrow))
    assert not format.matches((narrow, wide))  # float32 moments with mu_dtype=bfloat16
    assert not format.matches((wide, wide))
    assert format.num_arrays(3) == 3


def test_bfloat16_rounds_each_moment_with_its_own_bits():
    encode = jax.jit(lambda moments, bits: BFloat16().encode(moments, None, SimpleNamespace(bits=lambda k: bits[k])))
    halfway = np.full(3, 1 + 2.0**-8, np.float32)
    up, down = encode((halfway, halfway), [np.full(3, x << 16, np.uint32) for x in (0x8000, 0x7FFF)])
    assert (up.dtype, down.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (up.tolist(), down.tolist()) == ([1 + 2.0**-7] * 3, [1.0] * 3)
    (wide,) = encode((np.full(3, 2.0, np.float16),), [np.full(3, 0x5555 << 16, np.uint32)])
    assert wide.tolist() == [2.0] * 3


@pytest.mark.parametrize(("dtypes", "name"), [
    ((jnp.int8, jnp.uint8, jnp.float32, jnp.float32), "int8"),
    ((jnp.bfloat16, jnp.bfloat16), "bfloat16"),
    ((jnp.bfloat16, jnp.float32), "float32"),
    ((jnp.float32, jnp.float32), "float32"),
])  # fmt: skip
def test_format_of(dtypes, name):
    assert formats.format_of([zeros((4, 4), dtype) for dtype in dtypes]).name == name


BETAS = {"b1": 0.9, "b2": 0.999}
LARGE, SMALL = zeros((64, 128)), zeros(64)


def test_format_selector_by_name():
    for name in FORMATS:
        choose = formats.format_selector(name, None, BETAS)
        assert choose((), LARGE).name == name
        assert choose((), zeros((64, 128), jnp.complex64)).name == "float32"
    assert formats.format_selector("int8", None, BETAS)((), SMALL).name == "float32"
    assert formats.format_selector("bfloat16", None, None)((), SMALL).name == "bfloat16"
    assert formats.format_selector("float32", jnp.bfloat16, None)((), SMALL).mu_dtype == jnp.bfloat16
    assert formats.format_selector("bfloat16", None, None)((), zeros(2, jnp.complex64)).mu_dtype is None


def test_format_selector_by_function():
    seen = []

    def moments(path, leaf):
        seen.append((path, leaf.shape))
        return {"['a']": "int8", "['b']": "bfloat16"}[path]

    choose = formats.format_selector(moments, None, BETAS)
    (a, _), (b, _) = jax.tree_util.tree_leaves_with_path({"a": 1, "b": 2})
    assert (choose(a, LARGE).name, choose(a, SMALL).name, choose(b, SMALL).name) == ("int8", "float32", "bfloat16")
    assert seen == [("['a']", (64, 128)), ("['a']", (64,)), ("['b']", (64,))]


NAMES = "'bfloat16' or 'float32' or 'int8'"
FUNCTION = "or a function f(path, leaf) that returns one of them"


@pytest.mark.parametrize(("given", "text"), [
    (("int4", None, BETAS), f"moments must be {NAMES} {FUNCTION}, got 'int4'. Did you mean 'int8'?"),
    ((jnp.float16, None, BETAS), f"moments must be {NAMES} {FUNCTION}, got 'float16'. Did you mean"),
    (("int8", jnp.bfloat16, BETAS), "mu_dtype must be None with moments='int8', got"),
    (("bfloat16", jnp.bfloat16, BETAS), "mu_dtype must be None with moments='bfloat16', got"),
    ((lambda path, leaf: "int8", jnp.bfloat16, BETAS), "mu_dtype must be None when moments is a function, got"),
])  # fmt: skip
def test_format_selector_refuses(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        formats.format_selector(*given)


def test_format_selector_refuses_the_result_of_a_function():
    choose = formats.format_selector(lambda path, leaf: 8, None, BETAS)
    with pytest.raises(ValueError, match=rf"^moments\(\'\', leaf\) must be {NAMES}, got 8\.$"):
        choose((), LARGE)


def test_random_bits():
    salt = formats.leaf_salt("['w']")
    assert salt == zlib.crc32(b"['w']")

    @jax.jit
    def bits(t):
        """Random bits and their reference, for the whole array by stream, then for a part."""
        index = linear_index((2, 3))
        part = index[:, 1:]
        whole = formats.random_bits((2, 3), salt, t, None)
        found = [whole.bits(0), whole.bits(1), whole.bits(2), formats.random_bits((2, 2), salt, t, part).bits(0)]
        t = t.astype(jnp.uint32)
        return found, [*(dither(index, salt, t, k) for k in range(3)), dither(part, salt, t, 0)]

    for found, expected in zip(*bits(np.int32(7)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_placeholder_and_version():
    assert (formats.VERSION, formats.version().shape, formats.version().dtype) == (2, (2,), jnp.int8)
    for shape in ((), (5,), (3, 4)):
        stand_in = formats.placeholder(zeros(shape))
        assert (stand_in.shape, stand_in.dtype, stand_in.nbytes) == ((1,) * len(shape), jnp.int8, 1)
        assert not np.asarray(stand_in).any()
        assert formats.is_placeholder(stand_in)
    assert formats.placeholder(zeros(3), jnp.uint16).dtype == jnp.uint16
    assert not formats.is_placeholder(zeros((2, 1)))
    assert formats.is_placeholder(zeros((0, 1)))


def test_leaf_name():
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(zeros(2))

    (path, _), *_ = jax.tree_util.tree_leaves_with_path(nnx.state(Model()))
    assert formats.leaf_name(path) == "['w']"
    assert formats.leaf_name((jax.tree_util.DictKey("value"),)) == "['value']"
