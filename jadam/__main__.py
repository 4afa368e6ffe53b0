"""The program: ``jadam``, and ``python -m jadam``."""

import sys

from jadam._cli import interrupt


def main() -> int:
    """Run the command line; return the exit code: 0 success, 2 bad input or output not writable, 130 interrupted."""
    interrupt.end_on_ctrl_c(" ".join(["jadam", *sys.argv[1:2]]))
    from jadam._cli import command_line  # imports more, and by now Ctrl-C is handled

    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())
