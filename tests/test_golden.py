"""Regression tests against the trajectories, states and public names in ``tests/golden``.

On the processor, instruction set and jaxlib that made the golden files, bits are compared. Elsewhere, and always for
XLA's path, one step from each saved state is compared: to 2 ulp of max(|old|, |increment|), for parameters 5e-7 of the
update besides, and all but one code in ten thousand. Between two float32 that differ by 2 ulp lies a rounding
threshold of bfloat16 with probability 2**-15, and of int8 with a smaller one.
"""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden import cases, where
from helpers import RSQRT_ERROR, assert_equal, parametrize, update_and_apply

import jadam

FOLDER = Path(os.environ.get("JADAM_GOLDEN", Path(__file__).parent / "golden"))
MADE = json.loads((FOLDER / "made.json").read_text())
SAVED = sorted(path.stem for path in (FOLDER / "states").glob("*.npz"))
with np.load(FOLDER / "trajectories.npz") as _file:
    SAVED_CASES = sorted({x.split("/")[0] for x in _file.files} - {"params", "gradients"})  # without newer relatives
UPDATE = 5e-7  # relative difference of the kernel's and XLA's updates, as in helpers.py


def ulps(name):
    """Tolerance in ulp: 2, or 4 where rounded numbers are used once more.

    A global norm, summed in any order, scales gradients, which are then squared; 1 - b of a scheduled b is a difference
    of rounded numbers; AMSGrad stores a quotient of two.
    """
    return 4 if any(x in name for x in ("chain", "scheduled", "amsgrad")) else 2


@functools.cache
def stored():
    with np.load(FOLDER / "trajectories.npz") as file:
        return dict(file)


def comparable(case, params, state):
    """``{path: array}`` of parameters and state; for `exact_bf16` of float32 masters and inner state."""
    if hasattr(state, "remainder"):
        params, state = jadam.float32_params(params, state), state.inner_state
    leaves = jax.tree_util.tree_leaves_with_path((params, state))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def differences(found, expected, old, ulps):
    """Messages for floats out of tolerance, the number of differing codes, and the number of codes."""
    lines, differ, codes = [], 0, 0
    int8 = any("mu_scale" in name for name in found)
    for name, a in found.items():
        b, c = expected[name], old[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if a.dtype == np.complex64:
            a, b, c = (np.stack([x.real, x.imag]) for x in (a, b, c))
        if a.dtype != np.float32:
            differ, codes = differ + np.sum(a != b), codes + a.size
            continue
        a, b, c = (x.astype(np.float64) for x in (a, b, c))
        close = ulps * 2.0**-23 * np.maximum(np.abs(c), np.abs(b - c)) + 1e-44
        close += (UPDATE + RSQRT_ERROR * int8) * np.abs(b - c) * name.startswith("[0]")
        close += RSQRT_ERROR * np.abs(b) * ("mu_scale" in name)
        far = np.abs(a - b) / close
        if np.max(far, initial=0) > 1:
            lines.append(f"{name} is off by {np.max(far):.2f} of what is allowed")
    return lines, differ, codes


def check_steps(name, step, saved, transitions):
    """Messages for each of ``transitions`` where ``step(g, state, params)`` does not lead to the saved next state."""
    case = cases.CASES[name]
    _, gradients = cases.inputs(case, stored())
    lines, differ, codes = [], 0, 0
    for t in transitions:
        params, state = saved[t - 1]
        result = step(jax.tree.map(lambda g, t=t: g[t - 1], gradients), state, params)
        rows = [comparable(case, *x) for x in (result, saved[t], saved[t - 1])]
        more, *counts = differences(*rows, ulps(name))
        lines += [f"{name}, step {t}: {line}" for line in more]
        differ, codes = differ + counts[0], codes + counts[1]
    # one code may differ, or 1e-4 of them
    return lines + [f"{name}: {differ} codes of {codes} differ"] * bool(differ > max(1, 1e-4 * codes))


def saved_states(name):
    """``{step: (params, state)}``, saved ones and the initial one."""
    case = cases.CASES[name]
    params, _ = cases.inputs(case, stored())
    return {0: (params, case.make().init(params)), **cases.from_arrays(name, case, stored())}


@pytest.mark.parametrize("name", SAVED_CASES)
def test_step(name):
    """All 20 steps, to the bit on the machine that made them, else each within rounding."""
    saved, case = saved_states(name), cases.CASES[name]
    if where.here() == {key: MADE[key] for key in where.here()}:
        for t, kept in cases.trajectory(case, stored()).items():
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(saved[t]), strict=True):
                np.testing.assert_array_equal(a, b, f"{name}, step {t}, {jax.tree_util.keystr(path)}")
        return
    step = jax.jit(functools.partial(jadam.step, case.make()))
    assert check_steps(name, step, saved, [t for t in saved if t - 1 in saved]) == []


DEFAULT = ["adam, float32", "adam, bfloat16", "adam, int8", "amsgrad, float32", "radam, bfloat16", "adam, complex"]
DEFAULT += ["nadamw, int8", "adamax, float32", "adamw, mask", "by_path", "chain, clip_by_global_norm"]
DEFAULT += ["exact_bf16, int8"]


@parametrize("name", SAVED_CASES, default=DEFAULT, slow=[])
def test_update_and_apply(name):
    """`update_and_apply` under jit, all saved steps at once with `jax.vmap`."""
    saved, case = saved_states(name), cases.CASES[name]
    _, gradients = cases.inputs(case, stored())
    transitions = [t for t in saved if t - 1 in saved]
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(list(map(jnp.asarray, x))), *trees)
    before = stack([saved[t - 1] for t in transitions])
    g = jax.tree.map(lambda g: g[np.array(transitions) - 1], gradients)
    step = jax.jit(jax.vmap(functools.partial(update_and_apply, case.make())))
    after = step(g, before[1], before[0])
    rows = {t: jax.tree.map(lambda x, i=i: x[i], after) for i, t in enumerate(transitions)}
    results = iter(rows.values())
    assert check_steps(name, lambda *_: next(results), saved, transitions) == []


@parametrize("name", SAVED_CASES, default=["adam, float32"], slow=["adam, int8"])
def test_eager(name):
    """`update_and_apply` without jit, the last step."""
    step = functools.partial(update_and_apply, cases.CASES[name].make())
    assert check_steps(name, step, saved_states(name), [cases.STEPS]) == []


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("kind", ["npz", "orbax"])
def test_saved_states_load(name, kind):
    """Saved states restore to those of the tenth step."""
    (case,) = (x for x in cases.CASES if x.replace(", ", "-").replace(" ", "_") == name)
    params, state = saved_states(case)[10]
    if kind == "npz":
        with np.load(FOLDER / "states" / f"{name}.npz") as file:
            again = where.unnamed(file, state)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, jax.tree.map(jnp.asarray, state))
            again = checkpointer.restore((FOLDER / "states" / name).resolve(), like)
    assert_equal(again, state)
    jax.eval_shape(cases.CASES[case].make().update, params, again, params)


def test_public_names():
    """Public names and their arguments are unchanged."""
    found, saved = where.public_names(), json.loads((FOLDER / "names.json").read_text())
    assert {name: found.get(name, "lost") for name in saved} == saved
