"""Files written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file to write, which then takes the place of ``path``; after an error that is what it was."""
    scratch = scratch_of(path)
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def scratch_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")
