"""Global modes: eight CPU devices, JAX's config, the persistent compilation cache, and a count of compilations."""

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

COMMITTED = Path(__file__).parent / "compilations.json"  # programs XLA compiles in a default run, by JAX's version
MARGIN = 1.3  # workers share what they compile by chance
CACHE_BYTES = 2**30

compiled = {"here": 0, "workers": 0}


def _count(event, *_, **__):
    compiled["here"] += event == "/jax/core/compile/backend_compile_duration"  # also what comes from the cache


def _link(source: Path, target: Path) -> None:
    """Hard links in ``target`` to the files of ``source``: JAX never writes into a file that is there."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*-cache"):
        with contextlib.suppress(FileExistsError):
            os.link(file, target / file.name)


def pytest_configure(config):
    """A compilation cache of this process, which begins with what earlier runs compiled.

    JAX writes its files neither at once nor under a lock, so each process has a folder of its own; the first process
    collects them when all are done. Programs that tests start have no cache.
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
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # else the folder's name is part of the key
    jax.monitoring.register_event_duration_secs_listener(_count)


FOLDERS = pytest.StashKey[tuple[Path, Path]]()


def pytest_unconfigure(config):
    """What this process compiled is kept for the next run."""
    if FOLDERS in config.stash:
        common, own = config.stash[FOLDERS]
        _link(own, common)
        shutil.rmtree(own)


def pytest_sessionfinish(session):
    """A worker tells how many programs it compiled; the first process compares the sum with the committed number."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compiled"] = compiled["here"]
        return
    limit = _limit(session.config)
    if limit is not None and sum(compiled.values()) > limit:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """The worker's number."""
    compiled["workers"] += getattr(node, "workeroutput", {}).get("compiled", 0)


def pytest_terminal_summary(terminalreporter, config):
    """A line with the count."""
    count, limit = sum(compiled.values()), _limit(config)
    against = "" if limit is None else f", at most {limit} in a default run with jax {jax.__version__}"
    terminalreporter.write_line(f"XLA compiled {count} programs{against}")
    if limit is not None and count > limit:
        terminalreporter.write_line(f"Too many. If they are needed, change {COMMITTED.name}.", red=True)


def _limit(config) -> int | None:
    """The number that a default run must not exceed, or None for another run or another JAX."""
    default = config.getini("addopts")[config.getini("addopts").index("-m") + 1]
    whole = (
        config.args == config.getini("testpaths") and config.option.markexpr == default and not config.option.keyword
    )
    number = json.loads(COMMITTED.read_text()).get(jax.__version__) if whole else None
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
    """A function that returns how many programs XLA has compiled in this process."""
    return lambda: compiled["here"]


@pytest.fixture
def x64():
    with _config(jax_enable_x64=True):
        yield


@pytest.fixture
def strict():
    """No implicit promotion of dtypes or ranks: what a user with these modes on needs of us."""
    with _config(jax_numpy_dtype_promotion="strict", jax_numpy_rank_promotion="raise"):
        yield
