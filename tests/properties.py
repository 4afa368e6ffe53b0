"""A property as a test on a few examples, always the same, and another on ten thousand new ones before a release."""

import inspect

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ALWAYS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


def holds(few=25, many=10_000, default=None, **strategies):
    """The decorated body, which asserts, as a test of ``few`` examples and another, `nightly`, of ``many``.

    ``default`` has narrower strategies for the first, which compile less; a third, `slow`, takes few of the wide ones.
    Arguments of the body without a strategy are pytest's. A failure of the second prints the line that repeats it.
    """
    marks = [pytest.param(few, True, id=str(few)), pytest.param(many, False, id=str(many), marks=pytest.mark.nightly)]
    if default is not None:
        marks.insert(1, pytest.param(few, False, id=f"{few} of all", marks=pytest.mark.slow))

    def as_tests(body):
        def test(examples, narrow, **others):
            how = settings(
                max_examples=examples,
                derandomize=examples == few,
                print_blob=True,
                database=None,
                deadline=None,
                suppress_health_check=ALWAYS,
            )
            how(given(**strategies | (default or {} if narrow else {}))(body))(**others)

        parameter = lambda name: inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        others = [p for name, p in inspect.signature(body).parameters.items() if name not in strategies]
        test.__signature__ = inspect.Signature([parameter("examples"), parameter("narrow"), *others])
        test.__name__, test.__doc__, test.__module__ = body.__name__, body.__doc__, body.__module__
        return pytest.mark.parametrize(("examples", "narrow"), marks)(test)

    return as_tests


# Decay rates over all of [0, 1): the usual, the ends, and as many near 1 as near 0.
RATES = (
    st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999, 0.9999, 5e-324, 1e-20, 1 - 2.0**-53])
    | st.floats(0, 1, exclude_max=True)
    | st.floats(0, 53).map(lambda x: 1 - 2.0**-x)
)
EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 2.0**-126, 3e38]
NUMBERS = st.floats(width=32) | st.sampled_from(EDGES)
SEEDS = st.integers(0, 2**32 - 1)


def any_floats(shape, seed, numbers):
    """float32 over all its bit patterns, among them these ``numbers``."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    return _sprinkled(x, rng, numbers)


def tame_floats(shape, seed, numbers=(), smallest=2.0**-49, largest=2.0**59):
    """float32 of either sign with sizes in a range of which the logarithm is uniform, default from 2e-15 to 6e17."""
    rng = np.random.default_rng(seed)
    low, high = np.log2([smallest, largest])
    centre, spread = rng.uniform(low, high), rng.uniform(0, high - low)
    x = np.exp2(np.clip(rng.uniform(centre - spread, centre + spread, shape), low, high)) * rng.choice([-1, 1], shape)
    return _sprinkled(x.astype(np.float32), rng, numbers)


def _sprinkled(x, rng, numbers):
    flat = np.array(x).reshape(-1)
    if flat.size and len(numbers):
        places = rng.integers(0, flat.size, len(numbers))
        flat[places] = np.array(numbers, np.float32)
    return flat.reshape(np.shape(x))
