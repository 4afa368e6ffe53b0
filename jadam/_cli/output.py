"""Saved plots and one-line errors of the command line."""

import io
from pathlib import Path

from jadam._cli import interrupt
from jadam._core.files import atomic_replace, temporary_path


class CommandError(Exception):
    """An error that the command line reports in one line."""


def check_picture(out: Path) -> None:
    """Raise `CommandError` if a plot cannot be written to ``out``; called before the work starts."""
    with interrupt.postponed():
        from matplotlib.figure import Figure  # may write a list of fonts

    formats = Figure().canvas.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in formats:
        raise CommandError(f"--out must end in one of {', '.join(f'.{x}' for x in sorted(formats))}, got {out}")
    try:
        if out.is_dir():
            raise CommandError(f"--out must be a file, {out} is a folder")
        with interrupt.postponed():
            temporary_path(out).touch()
            temporary_path(out).unlink()
    except OSError as error:
        raise CommandError(f"--out: cannot write {out.name} into {out.parent}: {error.strerror}") from None
    except ValueError as error:  # a null byte
        raise CommandError(f"--out must be a file name, got {str(out)!r}: {error}") from None


def save_picture(figure, out: Path) -> None:
    """Write the plot to ``out``, atomically: on failure an existing file stays unchanged."""
    try:
        figure.savefig(picture := io.BytesIO(), dpi=130, format=out.suffix.removeprefix(".").lower())
        with interrupt.postponed(), atomic_replace(out) as scratch:
            scratch.write_bytes(picture.getvalue())
    except OSError as error:
        raise CommandError(f"--out: cannot write {out}: {error.strerror}") from None
