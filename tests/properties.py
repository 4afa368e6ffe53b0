"""Hypothesis: `property_test`, and strategies and arrays for it."""

import inspect

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def property_test(few=25, many=10_000, narrow=None, **strategies):
    """Decorator: turns a function that asserts a property of ``strategies`` into pytest tests.

    One test tries ``few`` examples, always the same; another, marked `nightly`, tries ``many`` new ones and prints how
    to reproduce a failure. ``narrow`` replaces some strategies in the first by narrower ones, which compile fewer
    programs; the wide ones are then tried by a third test, marked `slow`. Arguments without a strategy are pytest's.
    """
    marks = [pytest.param(few, True, id=str(few)), pytest.param(many, False, id=str(many), marks=pytest.mark.nightly)]
    if narrow is not None:
        marks.insert(1, pytest.param(few, False, id=f"{few} of all", marks=pytest.mark.slow))

    def decorate(body):
        def test(examples, narrowed, **others):
            configure = settings(
                max_examples=examples,
                derandomize=examples == few,
                print_blob=True,
                database=None,
                deadline=None,
                suppress_health_check=SUPPRESSED,
            )
            configure(given(**strategies | (narrow or {} if narrowed else {}))(body))(**others)

        parameter = lambda name: inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = [p for name, p in inspect.signature(body).parameters.items() if name not in strategies]
        test.__signature__ = inspect.Signature([parameter("examples"), parameter("narrowed"), *others])
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        return pytest.mark.parametrize(("examples", "narrowed"), marks)(test)

    return decorate


# Betas in [0, 1): usual ones, both ends, uniform ones, and log-uniform distances from 1.
BETAS = (
    st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999, 0.9999, 5e-324, 1e-20, 1 - 2.0**-53])
    | st.floats(0, 1, exclude_max=True)
    | st.floats(0, 53).map(lambda x: 1 - 2.0**-x)
)
EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 2.0**-126, 3e38]
NUMBERS = st.floats(width=32) | st.sampled_from(EDGES)
SEEDS = st.integers(0, 2**32 - 1)


def any_floats(shape, seed, numbers):
    """float32 array of uniformly random bit patterns, with ``numbers`` at random places."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    return _insert_at_random(x, rng, numbers)


def moderate_floats(shape, seed, numbers=(), smallest=2.0**-49, largest=2.0**59):
    """float32 array of either sign, |x| log-uniform in a random part of [smallest, largest]: default 2e-15 to 6e17."""
    rng = np.random.default_rng(seed)
    low, high = np.log2([smallest, largest])
    centre, spread = rng.uniform(low, high), rng.uniform(0, high - low)
    x = np.exp2(np.clip(rng.uniform(centre - spread, centre + spread, shape), low, high)) * rng.choice([-1, 1], shape)
    return _insert_at_random(x.astype(np.float32), rng, numbers)


def _insert_at_random(x, rng, numbers):
    flat = np.array(x).reshape(-1)
    if flat.size and len(numbers):
        places = rng.integers(0, flat.size, len(numbers))
        flat[places] = np.array(numbers, np.float32)
    return flat.reshape(np.shape(x))


@st.composite
def parts(draw, min_rank=0):
    """Strategy: shape of a whole array, start and shape of a part."""
    whole = draw(st.lists(st.integers(1, 3), min_size=min_rank, max_size=5).map(tuple))
    starts = tuple(draw(st.integers(0, n - 1)) for n in whole)
    sizes = tuple(draw(st.integers(1, n - s)) for n, s in zip(whole, starts, strict=True))
    return whole, starts, sizes
