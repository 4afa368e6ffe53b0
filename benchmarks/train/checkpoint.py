"""Checkpoints of a run, to resume it when it was killed."""

import hashlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

import jadam


class Checkpoint:
    """The last two states of a run on disk, each with its checksum. A context manager.

    Args:
        folder: of this run only. It is created.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)  # of killed saves
        self.manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    def save(self, chunk: int, tree) -> None:
        """Save ``tree``, the state after ``chunk`` chunks."""
        self.manager.save(chunk, args=ocp.args.StandardSave((tree, jadam.checksum(tree))))
        self.manager.wait_until_finished()

    def restore(self, tree):
        """Return the last undamaged checkpoint, ``(chunk, tree)``; without one 0 and ``tree``."""
        for chunk in sorted(self.manager.all_steps(), reverse=True):
            try:
                saved, checksum = self.manager.restore(chunk, args=ocp.args.StandardRestore((tree, jnp.uint32(0))))
            except (ValueError, OSError) as error:  # a file is missing or cut off
                print(f"train: checkpoint {chunk} in {self.folder} cannot be read: {str(error).splitlines()[0]}")
                continue
            if jadam.checksum(saved) == checksum:
                return chunk, jax.tree.map(jnp.asarray, saved)
            print(f"train: checkpoint {chunk} in {self.folder} is damaged")
        return 0, tree


def remove_others(folder: Path) -> None:
    """Delete the folders beside ``folder``: checkpoints of runs with other settings, which nothing resumes."""
    for other in folder.parent.glob("*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def checksum_of_sources(*folders: Path) -> str:
    """Return the SHA-256 of all Python files. Only the same code resumes a run."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
