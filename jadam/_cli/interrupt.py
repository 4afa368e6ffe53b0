"""Ctrl-C ends the program with one line and exit code 130, at any moment.

A `KeyboardInterrupt` would not do: Python drops one that is raised in a destructor or a callback, and an import may
turn it into another error.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

SHOW_CURSOR = b"\x1b[?25h\n"  # progress bars hide it


def end_on_ctrl_c(command: str) -> None:
    """From now on Ctrl-C ends the process. A shell script's background jobs ignore Ctrl-C, and still do."""

    def end(signum, frame):
        """Print the line and exit. Without cleaning up: files are written within `postponed`."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            if os.isatty(1) and os.environ.get("TERM") != "dumb":
                os.write(1, SHOW_CURSOR)
            os.write(2, f"{command}: interrupted\n".encode())
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Postpone Ctrl-C to the end of the block, which writes files."""
    signals = []
    handler = signal.signal(signal.SIGINT, lambda *_: signals.append(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if signals:
            signal.raise_signal(signal.SIGINT)
