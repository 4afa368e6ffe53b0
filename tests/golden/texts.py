"""The text of every error in ``test_checks``, without the parts that depend on versions."""

import functools
import json
import os
import re
import tempfile
from pathlib import Path

FOLDER = Path(os.environ.get("JADAM_GOLDEN", Path(__file__).parent))
VARYING = {
    r"0x[0-9a-f]+": "0x...",  # addresses
    r"\(choose from .*\)": "(choose from ...)",  # argparse quotes the choices before Python 3.12
    r"Tracer[<(](.*?)[>)]\.": r"Tracer(\1).",
    r'directory: "(.*)"': r"directory: \1",  # safetensors
    r"one of \.[., a-z]+, got": "one of ..., got",  # matplotlib's kinds of pictures
    r"(x00b\.png'): .*": r"\1: ...",  # Python's words for a null byte
}


def plain(text: str) -> str:
    """``text`` without addresses and version-dependent parts."""
    for pattern, replacement in VARYING.items():
        text = re.sub(pattern, replacement, text)
    return text


@functools.cache
def _remembered() -> dict[str, str]:
    return json.loads((FOLDER / "errors.json").read_text())


def remembered(name: str) -> str:
    """Saved text of a call."""
    return _remembered()[name]


def every() -> dict[str, str]:
    """Current texts, ``{name of the call: text}``."""
    import test_checks

    found = {}
    for name, (call, error, _) in test_checks.CALLS.items():
        try:
            call()
        except error as caught:
            found[name] = plain(str(caught))
    with tempfile.TemporaryDirectory() as folder:
        for i, (arguments, _) in enumerate(test_checks.COMMAND_LINE):
            found[f"command line-{i}"] = plain(test_checks.command_line(arguments, Path(folder))[2])
    return found
