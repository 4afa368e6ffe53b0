"""Global modes live here: eight CPU devices, one rule for warnings, and the fixtures that change JAX's config."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import collections
import contextlib

import jax
import pytest


@contextlib.contextmanager
def _config(**values):
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test marked ``every(n)`` each n-th case is always run, the others are `long`."""
    met = collections.Counter()
    for item in items:
        if mark := item.get_closest_marker("every"):
            name = item.nodeid.partition("[")[0]
            if met[name] % mark.args[0]:
                item.add_marker("long")
            met[name] += 1


@pytest.fixture
def x64():
    with _config(jax_enable_x64=True):
        yield


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks: what a user with these modes on needs of us."""
    with _config(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"):
        yield
