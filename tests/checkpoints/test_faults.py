"""Damaged checkpoints and unwritable disks cause errors, never wrong numbers, and older files stay intact."""

import errno
import functools
import json
import os
import re
import subprocess
import sys

import disks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import check_output, subprocess_env
from programs import damage
from programs.damage import bits, flipped

import jadam
from jadam import torch_state
from jadam._cli.command_line import main
from jadam._core import numerics

FLIPS = 201
# without coverage, whose files do not fit in 1 KiB
HERE = {name: x for name, x in subprocess_env().items() if not name.startswith("COV")}


# ---------------------------------------------------------------- the checksum

TREE = {
    "mu": jnp.asarray(np.random.default_rng(0).standard_normal((16, 24)), jnp.float32),
    "nu": [jnp.arange(-8, 8, dtype=jnp.int8), jnp.arange(16, dtype=jnp.uint8), jnp.ones(24, jnp.bfloat16)],
    "count": jnp.int32(3),
    "complex": jnp.full(8, 1 - 2j, jnp.complex64),
    "others": (jnp.full(8, 0.1, jnp.float16), jnp.arange(8, dtype=jnp.int4), jnp.arange(8) > 3, jnp.zeros((0, 8))),
    "none": None,
}


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.complex128, np.int64, "float32", "complex64", "bfloat16", "int8", "uint8", "int16", "uint32"],
)
def test_every_flipped_bit_changes_the_checksum(dtype):
    data = np.random.default_rng(0).standard_normal(5).astype(dtype).tobytes()
    tree = lambda data: (np.frombuffer(data, dtype), np.ones(3, np.float32))
    seen = {int(jadam.checksum(tree(flipped(data, place)))) for place in range(8 * len(data))}
    assert int(jadam.checksum(tree(data))) not in seen
    assert len(seen) == 8 * len(data)  # 640 random checksums collide once in 20,000 runs


def test_lowbias32_is_a_bijection():
    """`lowbias32` is a bijection, so a change of one word always changes the sum of hashes."""
    rng = np.random.default_rng(0)
    words = np.concatenate([rng.integers(0, 2**32, 10**6, np.uint32), np.arange(2**16, dtype=np.uint32) << 16])
    x = np.asarray(jax.jit(numerics.lowbias32)(words))
    inverse = lambda odd: np.uint32(pow(odd, -1, 2**32))
    x = (x ^ x >> 16) * inverse(0x846CA68B)
    x = (x ^ x >> 15 ^ x >> 30) * inverse(0x7FEB352D)
    np.testing.assert_array_equal(x ^ x >> 16, words)


def test_the_checksum_depends_on_places():
    x, y = np.arange(4, dtype=np.float32), np.ones((2, 2), np.float32)
    same = [
        {"x": x, "y": y},
        {"x": x[[1, 0, 2, 3]], "y": y},
        {"x": y.reshape(4), "y": x.reshape(2, 2)},
        {"x": y, "y": x},
        {"x": x.reshape(2, 2), "y": y},
        {"x": x, "z": y},
        {"x": x.view(np.int32), "y": y},
        {"x": x},
        {"x": [x], "y": y},
    ]
    assert len({int(jadam.checksum(tree)) for tree in same}) == len(same)


def test_the_checksum_does_not_depend_on_the_container():
    """Orbax without a target restores named tuples as dicts and tuples as lists."""
    state = jadam.adam(1e-3).init({"w": jnp.ones(3)})
    plain = [state[0]._asdict(), None]
    assert jadam.checksum(plain) == jadam.checksum(state)
    assert jadam.checksum(jax.tree.map(np.asarray, plain)) == jadam.checksum(state)


FEW = {name: TREE[name] for name in ("mu", "count", "complex")}  # eagerly each leaf needs a program
jitted = jax.jit(jadam.checksum)


@functools.cache
def checksums_on_one_device():
    return jadam.checksum(FEW), jadam.checksum(TREE), jitted(TREE)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit], ids=str)
def test_the_checksum_does_not_depend_on_the_devices(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))

    def put(x):
        spec = (*[None] * (x.ndim - 1), "x") if x.ndim else ()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    sharded = jax.tree.map(put, TREE)
    few, *others = checksums_on_one_device()
    of_few = [few, jadam.checksum({name: sharded[name] for name in FEW})]
    of_all = [*others, jitted(sharded)]
    assert {jax.typeof(x).str_short() for x in (*of_few, *of_all)} == {"uint32[]"}
    assert len({int(x) for x in of_few}) == len({int(x) for x in of_all}) == 1
    assert "all-gather" not in jitted.lower(sharded).compile().as_text()  # only sums are communicated


@pytest.mark.usefixtures("strict")
def test_the_checksum_under_strict_promotion():
    jax.eval_shape(jadam.checksum, TREE)  # promotion happens in the trace


@pytest.mark.usefixtures("x64")
def test_the_checksum_of_eight_bytes():
    wide = {"f": np.array([0.1, np.nan]), "i": np.int64(2**40), "c": np.array([1e-300 + 1j])}
    assert jadam.checksum(jax.tree.map(jnp.asarray, wide)) == jadam.checksum(wide)


@pytest.mark.parametrize(("leaf", "text"), [(jax.random.key(0), r"key<fry>"), ("name", "<U4")], ids=str)
def test_the_checksum_of_other_leaves_is_an_error(leaf, text):
    with pytest.raises(TypeError, match=rf"tree\['rng'\] must be an array of numbers, got {text}. Leave it out."):
        jadam.checksum({"rng": leaf})


# ---------------------------------------------------------------- damaged checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "exact_bf16", "int8"])
def test_a_damaged_checkpoint_is_an_error(name, tmp_path):
    """Damage is an error or changes nothing that is restored; no array ever has other bits."""
    flips, result = FLIPS // len(damage.CONFIGURATIONS), tmp_path / "damages.json"
    command = [sys.executable, damage.__file__, name, str(flips), result]
    check_output(command, env=HERE, timeout=100)
    damages = json.loads(result.read_text())
    assert damages[0] == damages[-1] == [None, "none", "same"]
    assert [x for x in damages if x[-1] == "other"] == []
    lost = [x[-1] for x in damages if x[0] == "arrays" and x[1] != "flipped"]
    assert lost == ["Orbax"] * 3
    found = [x[-1] for x in damages if x[:2] == ["arrays", "flipped"]]
    print({who: found.count(who) for who in set(found)})
    assert found.count("same") < flips / 2  # measured 5 %: bits of metadata that are not read


STATE = jadam.adam(1e-3).init({"kernel": jnp.zeros((24, 16)), "bias": jnp.zeros(16)})
NAMES = {"['kernel']": ("fc.weight", torch_state.LINEAR), "['bias']": "fc.bias"}


DAMAGED = (
    r"source must have the checksum \w+ that to_torch wrote, got \w+ in '.*adam\.safetensors'\. The file is",
    r"(?s)source must be a safetensors file, got '.*adam\.safetensors': .*\. The file is damaged",
)


@pytest.fixture
def file(tmp_path):
    """``(path, state)``: a file written by `to_torch`, and its state."""
    rng, path = np.random.default_rng(0), tmp_path / "adam.safetensors"
    flat = torch_state.to_torch(STATE, NAMES)
    flat = {key: np.abs(rng.standard_normal(x.shape)) if x.shape else np.float32(5) for key, x in flat.items()}
    state = torch_state.from_torch(flat, STATE, NAMES)
    torch_state.to_torch(state, NAMES, path)
    assert bits(torch_state.from_torch(path, STATE, NAMES)) == bits(state)
    return path, state


def test_a_flipped_bit_of_a_safetensors_file_is_an_error(file):
    path, state = file
    data = path.read_bytes()
    harmless = data.index(b"jadam.checksum")  # a flip in this key only removes the checksum
    errors = {}
    for place in np.random.default_rng(0).integers(8 * len(data), size=FLIPS):
        path.write_bytes(flipped(data, place))
        try:
            found = torch_state.from_torch(path, STATE, NAMES)
        except ValueError as error:
            text = str(error)
            who = "checksum" if re.match(DAMAGED[0], text) else "safetensors" if re.match(DAMAGED[1], text) else text
            errors[who] = errors.get(who, 0) + 1
        else:
            assert harmless <= place // 8 < harmless + len("jadam.checksum"), place
            assert bits(found) == bits(state)
    assert errors.keys() == {"checksum", "safetensors"}
    assert errors["checksum"] > FLIPS / 2  # arrays are most of the file


def test_a_truncated_safetensors_file_is_an_error(file):
    path, _ = file
    data = path.read_bytes()
    for length in (0, 7, 8, 9, *np.random.default_rng(0).integers(len(data), size=50), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=DAMAGED[1]):
            torch_state.from_torch(path, STATE, NAMES)


def test_metadata_of_a_safetensors_file(file):
    """The checksum is metadata, which other readers ignore; a file without it is accepted."""
    path, state = file
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {"jadam.checksum": f"{int(jadam.checksum(torch_state.to_torch(state, NAMES))):08x}"}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path)
    assert bits(torch_state.from_torch(path, STATE, NAMES)) == bits(state)


# ---------------------------------------------------------------- unwritable disks


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=disks.FAULTS, ids=lambda fault: fault.__name__)
def fault(request):
    """``(directory, unwritable, reason)``; ``unwritable()`` makes the directory so."""
    with request.param() as (directory, unwritable):
        yield directory, unwritable, os.strerror(disks.FAULTS[request.param])


def test_a_state_for_pytorch_on_a_bad_disk(fault):
    directory, unwritable, reason = fault
    path = directory / "adam.safetensors"
    torch_state.to_torch(STATE, NAMES, path)
    before = contents(directory)
    text = rf"path: cannot write .*adam\.safetensors: .*{reason}.*\. An existing file is unchanged\.$"
    with unwritable(), pytest.raises(OSError, match=text):
        torch_state.to_torch(STATE, NAMES, path)
    assert contents(directory) == before
    torch_state.to_torch(STATE, NAMES, path)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Imports what draws pictures, because another user may not be able to read the packages."""
    assert main(["plan", "--out", str(tmp_path_factory.mktemp("plan") / "picture.png")]) == 0


@pytest.mark.usefixtures("imported")
def test_a_picture_on_a_bad_disk(fault, capsys):
    directory, unwritable, reason = fault
    (directory / "picture.png").write_bytes(b"older")
    with unwritable():
        assert main(["plan", "--out", str(directory / "picture.png")]) == 2
    assert contents(directory) == {"picture.png": b"older"}
    _, err = capsys.readouterr()
    assert re.fullmatch(rf"jadam plan: error: --out: cannot write .*: {reason}\n", err)


def test_standard_output_on_a_full_disk():
    command = [sys.executable, "-m", "jadam", "plan", "--out", "picture.png"]
    with disks.limited() as (directory, unwritable), (directory / "log").open("w") as log:
        log.write("." * disks.KIB)  # the file is as long as the limit
        log.flush()
        with unwritable():
            run = {"stdout": log, "stderr": subprocess.PIPE, "text": True, "timeout": 60, "cwd": directory, "env": HERE}
            result = subprocess.run(command, **run)
        assert [path.name for path in directory.iterdir()] == ["log"]
    assert result.returncode == 2
    assert result.stderr == f"jadam plan: error: cannot print: {os.strerror(errno.EFBIG)}\n"
