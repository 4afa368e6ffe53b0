"""Training that is killed at any moment, also while saving, resumes to the bits of uninterrupted training."""

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time

import disks
import numpy as np
import pytest
from helpers import subprocess_env
from programs import resume
from programs.resume import CONFIGURATIONS, SAVE_EVERY, STEPS

pytestmark = pytest.mark.slow

MOMENTS = ["training", "saving", "starting", "saving", "training", "saving"]
SEEDS = 9  # 54 kills of each configuration


def command(configuration, directory, *arguments):
    program = [sys.executable, resume.__file__]
    return [*program, configuration, directory / "run", directory / "end.npz", *arguments]


ENVIRONMENT = subprocess_env(XLA_FLAGS="")  # one device


class Training:
    """The program in its own process group, with a log."""

    def __init__(self, configuration, directory, log):
        self.run, self.log = directory / "run", log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command(configuration, directory),
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self, pattern):
        return re.search(rf"^{pattern}\n", self.log.read_text(), re.MULTILINE)

    def until(self, condition, wait=100):
        """Waits until ``condition()`` holds; polls every millisecond."""
        deadline = time.monotonic() + wait
        while not condition():
            assert self.process.poll() is None, f"ended too early:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"took too long:\n{self.log.read_text()}"
            time.sleep(0.001)

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def stop(self):
        """Stops all threads of the process with SIGSTOP."""
        self.signal(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"ended too early:\n{self.log.read_text()}"


@contextlib.contextmanager
def training(*arguments):
    child = Training(*arguments)
    try:
        yield child
    finally:
        if child.process.poll() is None:
            child.signal(signal.SIGKILL)
            child.process.wait()


def complete(run):
    """Steps of the complete checkpoints, whose names are numbers."""
    return sorted(int(path.name) for path in run.glob("*") if path.name.isdecimal())


def under_way(run):
    """Steps of incomplete checkpoints."""
    return sorted(int(path.name.split(".")[0]) for path in run.glob("*.orbax-checkpoint-tmp*"))


def wait_for(moment, child, rng, start_up):
    """Waits for a random moment of this kind; returns a description of it."""
    if moment == "starting":
        time.sleep(delay := rng.uniform(0.5, 1) * start_up)  # the first half only imports
        return f"{delay:.3f} s after its start"
    child.until(lambda: child.said(r"resumed from \d+"))
    first, delay = int(child.said(r"resumed from (\d+)")[1]), rng.uniform(0, 0.02)
    if moment == "training":
        step = first + rng.integers(1, 12)
        child.until(lambda: child.said(f"step {step}"))
        time.sleep(delay)
        return f"{delay:.4f} s after step {step}"
    while True:
        child.until(lambda: max(complete(child.run), default=0) > first and under_way(child.run))
        time.sleep(delay)
        child.stop()  # a kill now leaves the disk as it is
        if under_way(child.run) == [complete(child.run)[-1] + SAVE_EVERY]:
            return f"{delay:.4f} s after its save began"
        child.signal(signal.SIGCONT)  # the save was complete: wait for the next one, with less delay
        delay /= 2


def contents(path):
    """``{name: (dtype, shape, bytes)}`` of every array."""
    with np.load(path) as arrays:
        return {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}


def differing(found, expected):
    return [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def uninterrupted(request, tmp_path_factory):
    """``(configuration, final arrays, seconds of start-up)`` of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    with training(request.param, directory, directory / "log") as child:
        child.until(lambda: child.said("resumed from 0"))
        start_up = time.monotonic() - began
        assert child.process.wait(100) == 0, child.log.read_text()
    loss = float(child.said(r"loss (\S+)")[1])
    assert loss < 1  # down from 2.6, so the bits depend on every step
    end = contents(directory / "end.npz")
    counts = {np.frombuffer(bits, dtype).item() for name, (dtype, _, bits) in end.items() if name.endswith(".count")}
    assert counts == {STEPS}
    return request.param, end, start_up


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, SEEDS + 1))])
def test_killed_and_resumed(seed, uninterrupted, tmp_path):
    configuration, expected, start_up = uninterrupted
    rng = np.random.default_rng(seed)
    run, resumed, interrupted = tmp_path / "run", [], []
    for number, moment in enumerate([*MOMENTS, "never"]):
        latest = max(complete(run), default=0)
        with training(configuration, tmp_path, tmp_path / f"log {number}") as child:
            if moment == "never":
                assert child.process.wait(100) == 0, child.log.read_text()
            else:
                when = wait_for(moment, child, rng, start_up)
                child.signal(signal.SIGKILL)
                assert child.process.wait(100) == -signal.SIGKILL, child.log.read_text()
                # pytest shows it when the test fails
                print(f"{moment}: killed {when}, seed {seed}; complete {complete(run)}, incomplete {under_way(run)}")
        if begun := child.said(r"resumed from (\d+)"):
            resumed.append(int(begun[1]))
            assert resumed[-1] == latest  # the newest complete checkpoint
        if moment == "saving":
            interrupted += under_way(run)
    assert differing(contents(tmp_path / "end.npz"), expected) == []
    assert len(interrupted) == MOMENTS.count("saving")
    assert sum(step > 0 for step in resumed) >= 4, (
        resumed
    )  # all runs that started training after the first complete save
    assert under_way(run) == []
    assert complete(run) == [STEPS - SAVE_EVERY, STEPS]


# the failing code is Orbax's, so one configuration is enough
one_configuration = pytest.mark.parametrize(
    "uninterrupted", [pytest.param("float32", marks=pytest.mark.nightly), "exact_bf16"], indirect=True, scope="module"
)


@one_configuration
def test_a_failed_save_is_an_error_and_harms_no_older_one(uninterrupted, tmp_path):
    configuration, expected, _ = uninterrupted
    run = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 100}
    failed = subprocess.run(command(configuration, tmp_path, "--disk-full-at", "30"), **run)
    assert failed.returncode == 1
    assert os.strerror(errno.EFBIG) in failed.stderr
    assert failed.stdout.splitlines()[-1] == "step 33"  # step 33's save waits for that of step 30, which failed
    assert (complete(tmp_path / "run"), under_way(tmp_path / "run")) == ([24, 27], [30])
    again = subprocess.run(command(configuration, tmp_path), **run)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("resumed from 27\n")
    assert differing(contents(tmp_path / "end.npz"), expected) == []


if disks.CAN_MOUNT:  # the test above does not need to mount

    @one_configuration
    def test_a_disk_that_is_full_and_then_read_only(uninterrupted, tmp_path):
        configuration, expected, _ = uninterrupted
        with disks.small_disk(4096 * disks.KIB) as disk:
            directory = disk.directory
            with training(configuration, directory, tmp_path / "full") as child:
                child.until(lambda: len(complete(child.run)) == 2)
                child.stop()
                before = complete(child.run)
                with disk.full():
                    child.signal(signal.SIGCONT)
                    assert child.process.wait(100) == 1
                assert os.strerror(errno.ENOSPC) in child.log.read_text()
            kept = complete(child.run)
            assert kept[-1] >= before[-1]  # the save under way may have had its space already
            with disk.read_only(), training(configuration, directory, tmp_path / "read-only") as child:
                assert child.process.wait(100) == 1
                assert os.strerror(errno.EROFS) in child.log.read_text()
            assert complete(child.run) == kept
            with training(configuration, directory, tmp_path / "again") as child:
                assert child.process.wait(100) == 0, child.log.read_text()
            assert child.said(rf"resumed from {kept[-1]}")
            assert differing(contents(directory / "end.npz"), expected) == []
