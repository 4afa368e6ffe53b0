"""Pictures on the command line, and errors in one line."""

from pathlib import Path

from jadam._core.files import atomic_replace, temporary_path


class CommandError(Exception):
    """What the command line reports in one line."""


def check_picture(out: Path) -> None:
    """Raise `CommandError` if a picture could not be written to ``out``, before an hour of training finds out."""
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    kind = out.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise CommandError(f"--out must end in one of {', '.join(f'.{k}' for k in sorted(kinds))}, got {out}")
    try:
        if out.is_dir():
            raise CommandError(f"--out must be a file, {out} is a folder")
        temporary_path(out).touch()
        temporary_path(out).unlink()
    except OSError as error:
        raise CommandError(f"--out: cannot write {out.name} into {out.parent}: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise CommandError(f"--out must be a file's name, got {str(out)!r}: {error}") from None


def save_picture(figure, out: Path) -> None:
    """Write the whole picture or, on failure, leave what was there."""
    try:
        with atomic_replace(out) as scratch:
            figure.savefig(scratch, dpi=130, format=out.suffix.removeprefix(".").lower())
    except OSError as error:
        raise CommandError(f"--out: cannot write {out}: {error.strerror}") from None
