"""The demo as its user meets it: a process with a terminal, a log file, a full disk or an impatient owner."""

import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import disks
import flax.nnx as nnx
import optax
import pytest

from jadam import _demo, _output
from jadam.__main__ import main

pytestmark = pytest.mark.xdist_group("demo")  # one process: they share a run of the demo

COMMAND = [sys.executable, "-m", "jadam", "demo"]


def demo(*arguments, cwd, **kwargs):
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, **kwargs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("demo")
    return demo(cwd=cwd), cwd


def rows(output):
    """The table's rows: {optimizer: [learning rate, accuracy, steps to 90 %, seconds, bytes]}."""
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")]
    return {name: [float(x) for x in rest] for name, *rest in cells}


def test_trains_on_real_digits(finished):
    result, cwd = finished
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    table = rows(result.stdout)
    assert list(table) == ["SGD", "optax.adam", "jadam.adam"]
    rate, accuracy, steps_to_90, _, size = table["jadam.adam"]
    assert (rate, size) == (1e-3, 8.0)
    assert accuracy >= 0.95
    assert steps_to_90 <= 500
    picture = cwd / "jadam-demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in result.stdout


def test_a_log_gets_no_control_codes(finished):
    result, _ = finished
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", result.stdout)


def test_same_start_same_batches():
    data = _demo.load(3)
    start = lambda: _demo.Classifier(nnx.Rngs(3))
    first, second = (
        _demo.train("", rate, optax.sgd(rate), start, data, 1, 3, lambda *_: None).loss for rate in (0.1, 1e-3)
    )
    assert first == second  # the loss before the first step, whatever was trained before


# A shell script's background jobs start with SIGINT ignored, and so would their children.
INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


def terminal(*arguments, cwd, interrupt_at=None):
    """Run the demo in a pseudo-terminal; return its exit code and all it wrote there."""
    main, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", INTERRUPTIBLE, *COMMAND, *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    output, deadline = b"", time.monotonic() + 100
    while time.monotonic() < deadline:
        if select.select([main], [], [], 0.2)[0]:
            try:
                chunk = os.read(main, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            output += chunk
            if interrupt_at and interrupt_at in output:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
    os.close(main)
    return process.wait(10), output.decode()


def test_a_terminal_shows_progress(tmp_path):
    code, output = terminal("--steps", "300", cwd=tmp_path)
    assert code == 0
    assert "\x1b[?25l" in output  # the cursor is hidden while it draws
    output = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", output)
    assert re.search(r"jadam\.adam ━+ 300/300", output)
    assert re.search(r"loss 0\.\d+, 9\d\.\d% of test digits", output)


def test_ctrl_c_stops_cleanly(tmp_path):
    code, output = terminal("--steps", "1000000", cwd=tmp_path, interrupt_at=b"loss")
    assert code == 130
    assert "jadam demo: interrupted, no picture written" in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_missing_extras_are_one_line_and_exit_2(tmp_path):
    script = "import sys; sys.modules['flax'] = None; from jadam.__main__ import main; sys.exit(main(['demo']))"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "jadam demo: error: flax is missing; pip install 'jadam[demo]'\n"


@pytest.mark.filterwarnings("ignore:.* deprecated, use:DeprecationWarning")  # matplotlib 3.9 with pyparsing from 3.3 on
def test_a_full_disk_leaves_the_old_picture(capsys):
    """`test_faults.py` has the other bad disks."""
    with disks.limited() as (directory, obstructed):
        out = directory / "old.png"
        out.write_bytes(b"precious")
        with obstructed():
            assert main(["demo", "--steps", "1", "--out", str(out)]) == 2
        assert out.read_bytes() == b"precious"
        assert list(directory.iterdir()) == [out]
    assert capsys.readouterr().err == f"jadam demo: error: --out: cannot write {out}: {os.strerror(errno.EFBIG)}\n"


def test_help():
    result = demo("--help", cwd=".")
    assert result.returncode == 0
    for option in ("--lr", "--steps", "--seed", "--out"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (ModuleNotFoundError(name="sklearn.datasets"), 2, "error: sklearn is missing; pip install 'jadam[demo]'"),
        (_output.CommandError("no\nroom"), 2, "error: no room"),
        (OSError(28, "No space left on device"), 2, "error: cannot print: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted, no picture written"),
    ],
)
def test_what_stops_it_is_one_line_and_an_exit_code(raised, code, text, monkeypatch, capsys):
    def run(*options):
        raise raised

    monkeypatch.setattr(_demo, "run", run)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restored
    assert main(["demo"]) == code
    assert capsys.readouterr().err == f"jadam demo: {text}\n"
