"""Every optimizer in every wrapper that has a state, with parameters and gradients of any floating dtype.

The right values are those of the same wrapper around Optax's optimizer, all in float32. Gradients and first parameters
are multiples of 1/8, and the steps of `sam` of 1/64, which 16 bits hold exactly.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MEMBERS, float32_params, parametrize, zip_leaves
from optax import contrib

import jadam

F32, F16, BF16, E4M3, E5M2 = jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2
LR, STEPS = 0.125, 6

CASES = {  # (parameter, gradient) of each leaf
    "float32": [(F32, F32), (F32, F32), (F32, F32)],
    "bfloat16": [(BF16, BF16), (BF16, BF16), (BF16, BF16)],
    "float16": [(F16, F16), (F16, F16), (F16, F16)],
    "bfloat16 gradients": [(F32, BF16), (F32, BF16), (F32, BF16)],
    "bfloat16 parameters": [(BF16, F32), (BF16, F32), (BF16, F32)],
    "mixed": [(F32, BF16), (BF16, F32), (BF16, BF16)],
    "mixed with float16": [(F32, BF16), (BF16, F32), (F16, F16)],
    "exact_bf16": [(F32, F32), (BF16, F32), (BF16, BF16)],  # with `jadam.exact_bf16` around the wrapper
}


def is_b(tree):
    """True for the leaf "b"."""
    return {name: x if isinstance(x, optax.MaskedNode) else name == "b" for name, x in tree.items()}


def multi_steps(tx):
    return optax.MultiSteps(tx, 2).gradient_transformation()


WRAPPERS = {  # `adam` makes an optimizer of the family, with the arguments of `make`
    "none": lambda adam: adam(),
    "chain": lambda adam: optax.chain(optax.clip(1.0), adam(), optax.scale(0.5)),
    "jadam.chain": lambda adam: jadam.chain(jadam.clip(1.0), adam()),
    "average_params": lambda adam: optax.chain(adam(), jadam.average_params(0.5)),
    "MultiSteps": lambda adam: multi_steps(adam()),
    "apply_if_finite": lambda adam: optax.apply_if_finite(adam(), 3),
    "apply_if_finite of MultiSteps": lambda adam: optax.apply_if_finite(multi_steps(adam()), 3),
    "conditionally_mask": lambda adam: optax.conditionally_mask(adam(), lambda step: step % 2 == 0),
    "schedule_free": lambda adam: contrib.schedule_free(adam(b1=0.0), LR),
    "lookahead": lambda adam: optax.lookahead(adam(), 2, 0.5, reset_state=True),
    "reduce_on_plateau": lambda adam: optax.chain(adam(), contrib.reduce_on_plateau(0.5, patience=1)),
    # with its default eps, which float16 rounds to 0, all parameters would be 0 / 0
    "mechanize": lambda adam: contrib.mechanize(adam(), weight_decay=0.0, eps=2.0**-10, s_init=1.0, num_betas=2),
    "sam": lambda adam: contrib.sam(adam(), optax.sgd(LR)),
    "flatten": lambda adam: optax.flatten(adam()),
    "masked": lambda adam: optax.masked(adam(), is_b),
    "partition": lambda adam: optax.partition({True: adam(), False: adam(learning_rate=LR / 2)}, is_b),
    "inject_hyperparams": lambda adam: optax.inject_hyperparams(adam.func, hyperparam_dtype=F32)(**adam.keywords),
}

# What the first step does. In the cells that no table below names it works, with jadam's and with Optax's optimizers.
WORKS = "works"
DRIFTS = "the state changes its dtypes"  # so the second step compiles again, and lax.scan raises
BRANCHES = (
    "branches must have equal output types"  # the gradients' and the updates'; cast gradients like their parameters
)
NO_COMMON_DTYPE = "Neither bfloat16 nor float16 can be promoted to the other"  # for the wrapper's own scalars
CLAMP = "clamp requires arguments to have the same dtypes"  # its scalars are bfloat16, a product with float32 is not
PAIRS = "updates.fast['a'] is missing or None, params has it"  # gradients are no pairs of fast and slow, parameters are

WRAPPER_FAILS = {  # with any optimizer inside
    ("apply_if_finite", "bfloat16 gradients"): BRANCHES,
    ("apply_if_finite", "mixed"): BRANCHES,
    ("apply_if_finite", "mixed with float16"): BRANCHES,
    ("apply_if_finite of MultiSteps", "bfloat16 gradients"): BRANCHES,
    ("apply_if_finite of MultiSteps", "mixed"): BRANCHES,
    ("apply_if_finite of MultiSteps", "mixed with float16"): BRANCHES,
    ("conditionally_mask", "bfloat16 gradients"): BRANCHES,
    ("conditionally_mask", "mixed"): BRANCHES,
    ("conditionally_mask", "mixed with float16"): BRANCHES,
    ("schedule_free", "mixed with float16"): NO_COMMON_DTYPE,
    ("reduce_on_plateau", "mixed with float16"): NO_COMMON_DTYPE,
    ("mechanize", "bfloat16 parameters"): CLAMP,
    ("mechanize", "mixed"): CLAMP,
    ("mechanize", "mixed with float16"): NO_COMMON_DTYPE,
    ("lookahead", "exact_bf16"): PAIRS,
}
if tuple(map(int, optax.__version__.split(".")[:3])) < (0, 2, 8):  # accumulates in the parameters' dtype
    WRAPPER_FAILS |= {
        ("MultiSteps", "bfloat16 parameters"): DRIFTS,
        ("MultiSteps", "mixed"): DRIFTS,
        ("MultiSteps", "mixed with float16"): DRIFTS,
        ("apply_if_finite of MultiSteps", "bfloat16 parameters"): BRANCHES,
    }

# Optax keeps moments in the parameters' dtype, and promotes them in the first step. jadam keeps them in float32.
OPTAX_FAILS = {
    **{(wrapper, case): DRIFTS for wrapper in WRAPPERS for case in CASES if case.startswith(("bfloat16 p", "mixed"))},
    ("apply_if_finite", "bfloat16 parameters"): BRANCHES,
    ("conditionally_mask", "bfloat16 parameters"): BRANCHES,
    ("inject_hyperparams", "bfloat16"): DRIFTS,
    ("inject_hyperparams", "float16"): DRIFTS,
    ("MultiSteps", "bfloat16 parameters"): WORKS,  # it casts the new state back
    ("MultiSteps", "mixed"): WORKS,
    ("MultiSteps", "mixed with float16"): WORKS,
    ("apply_if_finite of MultiSteps", "bfloat16 parameters"): WORKS,
    ("flatten", "mixed"): WORKS,  # it makes one array of all leaves, in float32
    ("flatten", "mixed with float16"): WORKS,
    **WRAPPER_FAILS,
}

DEFAULT = [
    ("none", "mixed with float16", "adam"),
    ("chain", "bfloat16", "adamax"),
    ("jadam.chain", "exact_bf16", "radam"),
    ("average_params", "bfloat16", "adamw"),
    ("MultiSteps", "bfloat16", "adamaxw"),
    ("apply_if_finite", "float16", "adamw"),
    ("apply_if_finite of MultiSteps", "exact_bf16", "amsgrad"),
    ("conditionally_mask", "bfloat16 gradients", "adam"),
    ("schedule_free", "mixed", "nadam"),
    ("lookahead", "mixed with float16", "nadamw"),
    ("reduce_on_plateau", "exact_bf16", "radam"),
    ("mechanize", "bfloat16 gradients", "adam"),
    ("sam", "float16", "adamax"),
    ("flatten", "bfloat16 parameters", "adamaxw"),
    ("masked", "bfloat16 gradients", "adamw"),
    ("partition", "mixed", "amsgrad"),
    ("inject_hyperparams", "float32", "nadam"),
]


def rows():
    """One optimizer in each cell of `DEFAULT`. Others: half of the family in each cell, the other half in the next.

    A fifth of these are slow, the rest nightly.
    """
    for wrapper, case, name in DEFAULT:
        yield pytest.param(wrapper, case, (name,), id=f"{wrapper}-{case}-{name}")
    for i, wrapper in enumerate(WRAPPERS):
        for j, case in enumerate(CASES):
            half = tuple(MEMBERS)[(i + j) % 2 :: 2]
            mark = pytest.mark.slow if (i + 3 * j) % 5 == 0 else pytest.mark.nightly
            yield pytest.param(wrapper, case, half, id=f"{wrapper}-{case}", marks=mark)


def make(whose, name, wrapper, case):
    """The wrapper around the optimizer; ``whose`` is "make" for jadam's and "optax" for Optax's."""
    member = MEMBERS[name]
    settings = {"learning_rate": LR, **member.settings} | ({"weight_decay": 0.1} if member.decays else {})
    tx = WRAPPERS[wrapper](functools.partial(getattr(member, whose), **settings))
    return jadam.exact_bf16(tx) if case == "exact_bf16" else tx


def random_tree(dtypes, limit, seed):
    """Multiples of 1/8 up to ``limit``, which is at most 2."""
    rng = np.random.default_rng(seed)
    numbers = lambda: rng.integers(-8 * limit, 8 * limit + 1, 3) / 8
    return {name: jnp.asarray(numbers(), dtype) for name, dtype in zip("abc", dtypes, strict=True)}


def first_params(wrapper, leaves):
    params = random_tree([p for p, _ in leaves], 1, seed=0)
    return optax.LookaheadParams(params, params) if wrapper == "lookahead" else params


def gradients(wrapper, leaves):
    """The gradients of each step; with `optax.apply_if_finite` one is NaN."""
    trees = [random_tree([g for _, g in leaves], 2, seed=1 + t) for t in range(STEPS)]
    if "apply_if_finite" in wrapper:
        trees[2]["b"] = trees[2]["b"].at[1].set(jnp.nan)
    return trees


def update(tx, wrapper, g, state, params):
    return tx.update(g, state, params, **{"value": 1.0} if wrapper == "reduce_on_plateau" else {})


def avals(tree):
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]


def outcome(tx, wrapper, leaves):
    """What the first step does: `WORKS`, `DRIFTS` or the text of its error. Nothing is compiled."""
    params, g = first_params(wrapper, leaves), gradients(wrapper, leaves)[0]
    try:
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(functools.partial(update, tx, wrapper), g, state, params)
        jax.eval_shape(optax.apply_updates, params, updates)
    except (TypeError, ValueError) as error:
        return str(error)
    return WORKS if avals(new_state) == avals(state) else DRIFTS


@functools.cache
def train(whose, names, wrapper, case):
    """What each optimizer has trained after all steps: parameters, float32 masters or averages."""
    txs = {name: make(whose, name, wrapper, case) for name in names}  # in one program, which compiles faster
    params = dict.fromkeys(names, first_params(wrapper, CASES[case]))
    states = {name: tx.init(params[name]) for name, tx in txs.items()}

    @jax.jit
    def step(g, states, params):
        new = {name: update(tx, wrapper, g, states[name], params[name]) for name, tx in txs.items()}
        return {x: optax.apply_updates(params[x], u) for x, (u, _) in new.items()}, {x: s for x, (_, s) in new.items()}

    for g in gradients(wrapper, CASES[case]):
        before = avals((params, states))
        params, states = step(g, states, params)
        assert avals((params, states)) == before
    if wrapper == "average_params":
        return {name: jadam.averaged_params(states[name]) for name in names}
    return {name: float32_params(params[name], states[name]) for name in names} if case == "exact_bf16" else params


# Roundings to the parameters' dtype in a step, each half a spacing. Without a wrapper two: of the update and of p + u.
ROUNDINGS = {
    "lookahead": 3,  # slow + 0.5 * (fast - slow) is one more
    "mechanize": 7,  # five in x0 - s * ((x0 - p) / s - u)
    "schedule_free": 9,  # three in x = (y - 0.1 * z) / 0.9, two in the average of x and z, two in the new y
}


@pytest.mark.parametrize(("wrapper", "case", "names"), list(rows()))
def test_training(wrapper, case, names):
    cell = wrapper, case
    expected = WRAPPER_FAILS.get(cell, WORKS)
    for name in names:
        assert expected in outcome(make("make", name, *cell), wrapper, CASES[case])
        assert OPTAX_FAILS.get(cell, WORKS) in outcome(make("optax", name, *cell), wrapper, CASES[case])
    if expected != WORKS:
        return
    ours, theirs = train("make", names, *cell), train("optax", names, wrapper, "float32")
    dtypes = [F32 if case == "exact_bf16" else p for p, _ in CASES[case]]
    if wrapper == "schedule_free":  # its scalars have the narrowest dtype of all parameters
        dtypes = [max(dtypes, key=lambda x: jnp.finfo(x).eps)] * 3
    for name in names:
        for i, (x, y) in enumerate(zip_leaves(ours[name], theirs[name])):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            rounding = float(jnp.finfo(dtypes[i % 3]).eps) / 2 * max(1, np.abs(y).max())
            # 1e-6: of Optax's direction, whose bias correction cancels in float32
            np.testing.assert_allclose(x, y, rtol=0, atol=STEPS * (ROUNDINGS.get(wrapper, 2) * rounding + 1e-6 * LR))


@parametrize("wrapper", list(WRAPPERS), default=["none", "MultiSteps", "partition", "flatten"])
def test_float8_gradients_are_refused(wrapper):
    """Optax's optimizers raise JAX's error, that 8-bit floats do not promote. Float8 parameters: see test_checks."""
    refused = (
        "must have at least 16 bits to be trained, got {}. Cast it, and undo its scaling if there is one: g.astype("
    )
    cases = {  # the leaf "b" is the one that `optax.masked` trains
        "float8": ([(F32, E4M3), (F32, E4M3), (F32, E4M3)], refused.format("float8_e4m3fn")),
        "mixed": ([(F32, F32), (F32, E5M2), (BF16, E4M3)], refused.format("float8_e5m2")),
        "exact_bf16": ([(BF16, BF16), (BF16, E4M3), (F32, F32)], refused.format("float8_e4m3fn")),
    }
    for case, (leaves, error) in cases.items():
        if (wrapper, case) == ("flatten", "mixed"):  # the wrapper itself cannot concatenate these
            error = "8-bit floats do not support implicit promotion"
        assert error in outcome(make("make", "adamw", wrapper, case), wrapper, leaves)
