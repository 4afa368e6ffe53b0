"""Eight CPU devices, a persistent compilation cache, a limit on the number of compilations, and fixtures."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import contextlib
import json
import shutil
from pathlib import Path

import jax
import pytest

LIMITS = Path(__file__).parent / "compilations.json"  # {JAX version: programs compiled in a default run}
MARGIN = 1.3  # which programs two workers both compile depends on how tests are distributed
CACHE_BYTES = 2**30

compiled = {"here": 0, "workers": 0}


def _count(event, *_, **__):
    compiled["here"] += event == "/jax/core/compile/backend_compile_duration"  # cache hits included


def _link(source: Path, target: Path) -> None:
    """Hard-links the cache files of ``source`` into ``target``. JAX never changes an existing file."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*-cache"):
        with contextlib.suppress(FileExistsError):
            os.link(file, target / file.name)


def pytest_configure(config):
    """Sets up this process's compilation cache, filled from earlier runs, and counts compilations.

    JAX writes cache files neither atomically nor under a lock, so each process has its own folder. The folders are
    merged at exit. Processes that tests start have no cache.
    """
    if hasattr(config, "cache"):
        common = config.cache.mkdir("jax") / jax.__version__
        if sum(x.stat().st_size for x in common.glob("*")) > CACHE_BYTES:
            shutil.rmtree(common)
        own = common.with_name(f"{common.name}-{os.getpid()}")
        _link(common, own)
        config.stash[FOLDERS] = common, own
        jax.config.update("jax_compilation_cache_dir", str(own))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else the folder is part of a key
    jax.monitoring.register_event_duration_secs_listener(_count)


FOLDERS = pytest.StashKey[tuple[Path, Path]]()


def pytest_unconfigure(config):
    """Keeps this process's cache for the next run."""
    if FOLDERS in config.stash:
        common, own = config.stash[FOLDERS]
        _link(own, common)
        shutil.rmtree(own)


def pytest_sessionfinish(session):
    """Reports a worker's count; in the controller, fails the run if the total is above the limit."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compiled"] = compiled["here"]
        return
    limit = _limit(session.config)
    if limit is not None and sum(compiled.values()) > limit:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds a worker's count."""
    compiled["workers"] += getattr(node, "workeroutput", {}).get("compiled", 0)


def pytest_terminal_summary(terminalreporter, config):
    """Prints the total."""
    count, limit = sum(compiled.values()), _limit(config)
    against = "" if limit is None else f", at most {limit} in a default run with jax {jax.__version__}"
    terminalreporter.write_line(f"XLA compiled {count} programs{against}")
    if limit is not None and count > limit:
        terminalreporter.write_line(f"Too many. If they are needed, change {LIMITS.name}.", red=True)


def _limit(config) -> int | None:
    """Most programs that a default run may compile; None for other runs and unknown versions of JAX."""
    default = config.getini("addopts")[config.getini("addopts").index("-m") + 1]
    whole = (
        config.args == config.getini("testpaths") and config.option.markexpr == default and not config.option.keyword
    )
    number = json.loads(LIMITS.read_text()).get(jax.__version__) if whole else None
    return None if number is None else int(MARGIN * number)


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


@pytest.fixture
def programs_compiled():
    """A function that returns the number of programs compiled so far in this process."""
    return lambda: compiled["here"]


@pytest.fixture
def x64():
    with _config(jax_enable_x64=True):
        yield


@pytest.fixture
def strict():
    """JAX's strict modes: no implicit promotion of dtypes or ranks."""
    with _config(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"):
        yield
