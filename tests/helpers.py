"""Helpers shared by several test files."""

import contextlib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family import FAMILY, SWITCHED
from jax.sharding import Mesh

import jadam
from jadam._cli.command_line import main
from jadam._core import numerics
from jadam._core.bf16 import join
from jadam._fused import step as _step

ROOT = Path(__file__).parent.parent
CPU = jadam.backends()["cpu"]
MESH = Mesh(np.array(jax.devices()), ("data",))
FORMATS = ["float32", "bfloat16", "int8"]
MEMBERS = {member.name: member for member in FAMILY}
INT8_OPTIMIZERS = ("adam", "adamw", "nadam", "nadamw")
needs_kernel = pytest.mark.skipif(CPU.kernel is None, reason=f"no CPU kernel: {CPU.reason}")


# ---------------------------------------------------------------- parametrization


def parametrize(name: str, values: Mapping | Iterable, default: Collection[str], slow: Collection[str] | None = None):
    """``pytest.mark.parametrize(name, values)``, where only the ids in ``default`` run by default; others are `slow`.

    A value's id is its key in a mapping, else its ``__name__`` or its ``str``.
    """
    return parametrize_grid({name: values}, default, slow)


def parametrize_grid(
    axes: Mapping[str, Mapping | Iterable], default: Collection[str], slow: Collection[str] | None = None
):
    """The same over the product of ``axes``, ``{name: values}``. An id joins the ids of its values with ``-``.

    If ``slow`` is given, only these other rows are `slow`, and the rest are `nightly`.
    """
    by_id = [_by_id(values) for values in axes.values()]
    products = {"-".join(ids): ids for ids in itertools.product(*by_id)}
    if unknown := {*default, *(slow or ())} - set(products):
        raise ValueError(f"default must hold ids of the grid, got {sorted(unknown)}; there are {sorted(products)}")
    params = [
        pytest.param(
            *(values[x] for values, x in zip(by_id, ids, strict=True)),
            id=row,
            marks=() if row in default else pytest.mark.slow if slow is None or row in slow else pytest.mark.nightly,
        )
        for row, ids in products.items()
    ]
    return pytest.mark.parametrize(tuple(axes), params)


def _by_id(values) -> dict:
    return dict(values) if isinstance(values, Mapping) else {getattr(x, "__name__", str(x)): x for x in values}


# ---------------------------------------------------------------- processes


def subprocess_env(**more):
    """Environment variables of a process that imports this jadam and the modules of ``tests``."""
    folders = Path(jadam.__file__).parents[1], ROOT / "tests"
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | more


def check_output(command, **kwargs):
    """Standard output of a command. A nonzero exit code fails the test and shows standard error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_cli(arguments, folder):
    """Runs ``jadam ARGUMENTS`` within ``folder``; returns exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:  # raised by argparse
            code = stop.code
    return code, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------- arrays


def on_host(tree):
    """The shardings of ``tree``, in host memory."""
    return jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), tree)


@functools.cache
def host_offload_reason() -> str:
    """Why a program here cannot move arrays to host memory, or "". On a CPU JAX 0.10.0 cannot, 0.10.2 can."""
    x = zeros(1)
    try:
        jax.jit(lambda x: x, out_shardings=on_host(x))(x)
    except Exception as error:
        return f"jax {jax.__version__} moves nothing to host memory on {jax.default_backend()}: {error}"
    return ""


def zeros(shape, dtype=np.float32):
    """``jnp.zeros`` without a compilation."""
    return jax.device_put(np.zeros(shape, dtype))


def ones(shape, dtype=np.float32):
    """``jnp.ones`` without a compilation."""
    return jax.device_put(np.ones(shape, dtype))


def normal(*shape, seed=0, dtype=np.float32):
    """Standard normal numbers, reproducible from shape and seed."""
    return jax.device_put(np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype))


SHAPES = {"a": (33, 300), "b": (77,), "c": ()}  # the last int8 block of a row of "a" is partial


def random_tree(seed, dtype=np.float32, shapes=SHAPES):
    """Random leaves of these shapes. Their elements' sizes spread over six decades."""
    rng = np.random.default_rng(seed)
    return {
        k: jax.device_put(np.asarray(rng.standard_normal(x) * 10.0 ** rng.uniform(-3, 3, x), dtype))
        for k, x in shapes.items()
    }


def zip_leaves(*trees):
    """Tuples of corresponding leaves."""
    return zip(*map(jax.tree.leaves, trees), strict=True)


def assert_equal(tree, expected):
    """Same structure, dtypes and values; no tolerance."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for x, y in zip_leaves(tree, expected):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def assert_same_finite(tree, expected):
    """The same elements are finite."""
    for x, y in zip_leaves(tree, expected):
        np.testing.assert_array_equal(np.isfinite(np.float32(x)), np.isfinite(np.float32(y)))


# ---------------------------------------------------------------- formulas


def lowbias32(x):
    """Wellons' hash ``lowbias32`` of a Python integer."""
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


round_to_bfloat16 = jax.jit(numerics.round_to_bfloat16)
float32_params = jax.jit(jadam.float32_params)


# ---------------------------------------------------------------- steps


def update_and_apply(tx, g, state, params):
    """One step with ``tx.update`` and `optax.apply_updates`; returns ``(params, state)``."""
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state


# Every rule and option that the kernels implement.
RULES = {
    "adam": lambda **k: jadam.adam(1.0, **k),
    "adam, small betas": lambda **k: jadam.adam(1.0, b1=0.2, b2=0.3, **k),
    "adam, eps_root": lambda **k: jadam.adam(1.0, eps_root=1e-3, **k),
    "adam, hat": lambda **k: jadam.adam(1.0, eps_mode="hat", **k),
    "adam, uncorrected": lambda **k: jadam.adam(1.0, bias_correction=False, **k),
    "adam, scheduled b1": lambda **k: jadam.adam(1.0, b1=optax.linear_schedule(0.5, 0.9, 8), **k),
    "scale_by_adam": lambda **k: jadam.scale_by_adam(**k),
    "adamw, masked": lambda **k: jadam.adamw(1.0, weight_decay=0.1, mask={"a": True, "b": False, "c": True}, **k),
    "adamw, scheduled": lambda **k: jadam.adamw(
        optax.linear_schedule(1.0, 0.5, 8), weight_decay=optax.linear_schedule(0.1, 0.2, 8), **k
    ),
    "adamw, max_lr": lambda **k: jadam.adamw(optax.linear_schedule(1.0, 0.5, 8), max_lr=1.0, weight_decay=0.1, **k),
    "nadam": lambda **k: jadam.nadam(1.0, **k),
    "nadamw, momentum": lambda **k: jadam.nadamw(1.0, weight_decay=0.1, momentum_decay=4e-3, **k),
    "adamax": lambda **k: jadam.adamax(1.0, **k),
    "amsgrad": lambda **k: jadam.amsgrad(1.0, **k),
    "amsgrad of v": lambda **k: jadam.amsgrad(1.0, max_of="v", **k),
    "radam": lambda **k: jadam.radam(1.0, **k),
    "radam of nadam": lambda **k: jadam.radam(1.0, nesterov=True, **k),
    "clip": lambda **k: jadam.chain(jadam.clip(1.0), jadam.adam(1.0, **k)),
    "clip by norm": lambda **k: jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adam(1.0, **k)),
    "both": lambda **k: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adam(1.0, **k)),
}
for _member in FAMILY:  # those that no row above names
    if not any(re.match(rf"{_member.name}\b", name) for name in RULES):
        RULES[_member.name] = functools.partial(_member.make, 1.0)
for _member, _switch in SWITCHED:
    RULES[f"{_member.name}, {', '.join(_switch)}"] = functools.partial(_member.make, 1.0, **_switch)


def takes_int8(rule) -> bool:
    """Whether a row of ``RULES`` can store its moments in int8."""
    try:
        make_optimizer(rule, "int8")
    except ValueError:
        return False
    return True


@functools.cache
def make_optimizer(rule, moments="float32"):
    """An optimizer of `RULES`; cached, so that tests share compiled programs."""
    return RULES[rule](moments=moments)


@functools.cache
def jitted_steps(tx):
    """`jadam.step` and `update_and_apply` of ``tx``, each jitted."""
    return [jax.jit(functools.partial(f, tx)) for f in (jadam.step, _step.update_and_apply)]


def count_kernel_calls(f, *args):
    """Number of kernel calls in the lowered ``jit(f)``."""
    return jax.jit(f).lower(*args).as_text().count("@jadam_step")


# Float32 parameters and the inner optimizer's state, from those of `jadam.exact_bf16`.
unwrap_exact_bf16 = jax.jit(lambda params, state: (jadam.float32_params(params, state), state.inner_state))

# XLA contracts products and sums to fused multiply-adds; the portable kernel may not, which is one rounding more.
ULPS = 4 if "portable" in str(CPU.kernel) else 2
RSQRT_ERROR = 8e-7  # of the kernel's 1 / sqrt(v) of int8 moments, see portable.h and test_error_of_rsqrt


def assert_steps_agree(new, expected, old, int8=False, ulps=ULPS):
    """Compares two results ``(params, state)`` of a step from ``old``.

    Tolerance of a stored float32: ``ulps`` of max(|old|, |increment|); for parameters 5e-7 * max(1, |update|) more.
    With ``int8`` moments, the scale of m / sqrt(v) has two more roundings, and both have `RSQRT_ERROR`.
    bfloat16 moments, remainders and int8 codes are equal, except where a rounding threshold lies between the results.
    """
    new, expected, old = jax.device_get((new, expected, old))
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    stored, update = (2 * ulps * 2.0**-23 + RSQRT_ERROR, 5e-7 + RSQRT_ERROR) if int8 else (ulps * 2.0**-23, 5e-7)
    for is_param, parts in enumerate(zip(new[::-1], expected[::-1], old[::-1], strict=True)):
        for a, b, c in zip_leaves(*parts):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            if a.dtype != jnp.float32 and not (is_param and a.dtype == jnp.bfloat16):
                # 2 ulp of float32 are 2**-15 of bfloat16's spacing: the chance that a threshold lies between
                assert np.mean(np.asarray(a) != np.asarray(b)) <= (1e-4 if a.size > 10**5 else 1e-3), a.dtype
                continue
            a, b, c = (np.asarray(x, np.float64) for x in (a, b, c))
            close = stored * np.maximum(np.abs(c), np.abs(b - c)) + 1e-44
            close += update * np.maximum(1, np.abs(b - c)) * is_param
            assert np.all((np.abs(a - b) <= close) | (a == b) | (np.isnan(a) & np.isnan(b))), (
                is_param,
                np.max(np.abs(a - b) / close * (a != b)),
                a.shape,
            )


def cut_part(whole, start, shape, x):
    """The part of an array of shape ``whole``, or of its int8 scales, that begins at ``start`` and has this shape."""
    length = -(-whole[-1] // x.shape[-1])  # 1, or that of a block
    last = slice(start[-1] // length, -(-(start[-1] + shape[-1]) // length))
    return x[(*(slice(i, i + n) for i, n in zip(start[:-1], shape[:-1], strict=True)), last)]


def with_master(has_remainder, p, stored):
    """A leaf's results with the float32 parameter instead of the rounded one and its remainder."""
    return (join(p, stored[0]), tuple(stored[1:])) if has_remainder else (p, tuple(stored))


def run_program(program, *args, timeout, **env):
    """Last line printed by a module of ``programs/``. A crash fails the test and names the call that caused it."""
    command = [sys.executable, "-W", "error", program.__file__, *map(str, args)]
    done = subprocess.run(
        command,
        env=subprocess_env(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = done.stdout.splitlines() or [""]
    assert done.returncode == 0, f"exit {done.returncode} in {program.__file__} {lines[-1]}\n{done.stderr}"
    return lines[-1]
