"""Directories that cannot be written to any more: full, mounted read-only, or forbidden."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

KIB = 1024
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def _can_mount():
    """Whether this system lets us have a mount of our own, as Linux does unless it is told not to."""
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


CAN_MOUNT = _can_mount()


class Disk:
    """A file system of a few KiB in memory, which only a shell's mount namespace has; others reach it through /proc."""

    def __init__(self, shell, mount_point):
        self._shell, self._mount_point = shell, mount_point
        self.directory = Path(f"/proc/{shell.pid}/root{mount_point}")

    def mount(self, options):
        self._shell.stdin.write(f"mount -t tmpfs -o {options} none '{self._mount_point}'; echo $?\n")
        self._shell.stdin.flush()
        assert self._shell.stdout.readline() == "0\n"

    @contextlib.contextmanager
    def full(self):
        filler = self.directory / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(KIB))
        yield
        filler.unlink()

    @contextlib.contextmanager
    def read_only(self):
        self.mount("remount,ro")
        yield
        self.mount("remount,rw")


@contextlib.contextmanager
def small_disk(size=512 * KIB):
    with tempfile.TemporaryDirectory() as mount_point:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([*UNSHARE, "sh"], **pipes) as shell:  # and the disk is gone with it
            disk = Disk(shell, mount_point)
            disk.mount(f"size={size}")
            yield disk


# Each yields a directory, and a context in which it cannot be written to.


@contextlib.contextmanager
def full():
    with small_disk() as disk:
        yield disk.directory, disk.full


@contextlib.contextmanager
def read_only():
    with small_disk() as disk:
        yield disk.directory, disk.read_only


@contextlib.contextmanager
def limited():
    """As on a full disk, a file is begun and cannot be finished; any process may limit itself so."""

    @contextlib.contextmanager
    def obstructed():
        _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (KIB, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), obstructed


@contextlib.contextmanager
def forbidden():
    """Nobody may write there; root may everywhere, so it becomes somebody else."""

    @contextlib.contextmanager
    def obstructed():
        me = os.geteuid()
        os.chmod(directory, 0o555)
        if me == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(me)
            os.chmod(directory, 0o755)

    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), obstructed


# For each, why a file cannot be written.
OBSTACLES = {limited: errno.EFBIG, forbidden: errno.EACCES}
if CAN_MOUNT:
    OBSTACLES |= {full: errno.ENOSPC, read_only: errno.EROFS}
