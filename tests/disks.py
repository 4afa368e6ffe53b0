"""Directories that become unwritable: disk full, mounted read-only, file size limited, or permission denied."""

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
    """Whether an unprivileged user may mount a file system in a namespace of its own, as on most Linux systems."""
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


CAN_MOUNT = _can_mount()


class Disk:
    """A tmpfs of a few KiB in the mount namespace of a shell process; this process reaches it through /proc."""

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
        with subprocess.Popen([*UNSHARE, "sh"], **pipes) as shell:  # the disk disappears with the shell
            disk = Disk(shell, mount_point)
            disk.mount(f"size={size}")
            yield disk


# Each context manager below yields a directory and a context manager that makes it unwritable.


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
    """File size limited to 1 KiB: as on a full disk, a file is begun but not finished. Needs no privileges."""

    @contextlib.contextmanager
    def unwritable():
        _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (KIB, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), unwritable


@contextlib.contextmanager
def forbidden():
    """No write permission. Root, who may write anywhere, becomes another user meanwhile."""

    @contextlib.contextmanager
    def unwritable():
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
        yield Path(directory), unwritable


# {context manager: errno of a write}
FAULTS = {limited: errno.EFBIG, forbidden: errno.EACCES}
if CAN_MOUNT:
    FAULTS |= {full: errno.ENOSPC, read_only: errno.EROFS}
