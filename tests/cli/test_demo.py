"""``jadam demo``: in a terminal, into a log file, on a full disk, and interrupted."""

import contextlib
import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time

import disks
import flax.nnx as nnx
import optax
import pytest
from helpers import run_cli, subprocess_env

from jadam._cli import demo as _demo
from jadam._cli import output as _output
from jadam._cli.command_line import main

# matplotlib 3.9 with pyparsing from 3.3 on
pytestmark = pytest.mark.filterwarnings("ignore:.* deprecated, use:DeprecationWarning")

INSTALL = "pip install flax matplotlib rich scikit-learn"
COMMAND = [sys.executable, "-m", "jadam", "demo"]


@pytest.fixture(scope="module", params=["here", pytest.param("a process", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory):
    """``(exit code, standard output, standard error, folder)`` of a run without options."""
    folder = tmp_path_factory.mktemp("demo")
    if request.param == "a process":
        result = subprocess.run(COMMAND, cwd=folder, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout, result.stderr, folder
    return *run_cli(["demo"], folder), folder


def table_rows(output):
    """The printed table: {optimizer: [learning rate, accuracy, steps to 90 %, seconds, bytes]}."""
    cells = [[c.strip() for c in line.strip("│").split("│")] for line in output.splitlines() if line.startswith("│")]
    return {name: [float(x) for x in rest] for name, *rest in cells}


def test_trains_on_real_digits(finished):
    code, out, err, folder = finished
    assert (code, err) == (0, "")
    table = table_rows(out)
    assert list(table) == ["SGD", "optax.adam", "jadam.adam"]
    rate, accuracy, steps_to_90, _, size = table["jadam.adam"]
    assert (rate, size) == (1e-3, 8.0)
    assert accuracy >= 0.95
    assert steps_to_90 <= 500
    picture = folder / "jadam-demo.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in out


def test_a_log_gets_no_control_codes(finished):
    _, out, _, _ = finished
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)


def test_same_start_same_batches():
    data = _demo.load(3)
    start = lambda: _demo.Classifier(nnx.Rngs(3))
    first, second = (
        _demo.train("", rate, optax.sgd(rate), start, data, 1, 3, lambda *_: None).loss for rate in (0.1, 1e-3)
    )
    assert first == second  # the loss before the first step


def read_terminal(main_end):
    """Yields the output of a pseudo-terminal until its other end is closed."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if select.select([main_end], [], [], 0.2)[0]:
            try:
                chunk = os.read(main_end, 65536)
            except OSError:  # Linux: the other end is closed
                return
            if not chunk:
                return
            yield chunk


def test_a_terminal_shows_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    main_end, side = pty.openpty()
    pieces = []
    reader = threading.Thread(target=lambda: pieces.extend(read_terminal(main_end)))
    reader.start()
    with open(side, "w") as terminal, contextlib.redirect_stdout(terminal):
        code = main(["demo", "--steps", "100", "--lr", "1e-2"])
    reader.join()
    os.close(main_end)
    output = b"".join(pieces).decode()
    assert code == 0
    assert "\x1b[?25l" in output  # the cursor is hidden while it draws
    output = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", output)
    assert re.search(r"jadam\.adam ━+ 100/100", output)
    assert re.search(r"loss 0\.\d+, test accuracy 9\d\.\d%", output)


# Background jobs of a shell script ignore SIGINT, and their children inherit that.
INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


def test_ctrl_c_stops_cleanly(tmp_path):
    main_end, side = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-c", INTERRUPTIBLE, *COMMAND, "--steps", "1000000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=side, stdout=side, stderr=side, env=env)
    os.close(side)
    output, interrupted = b"", False
    for chunk in read_terminal(main_end):
        output += chunk
        if not interrupted and b"loss" in output:
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(main_end)
    assert process.wait(10) == 130
    output = output.decode()
    assert "\x1b[?25l" in output
    assert "\x1b[?25h" in output  # and shown again
    assert "jadam demo: interrupted\r\n" in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


SIGINT_ON_IMPORT = """
import os, runpy, signal, sys

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class InDestructor:
    def __del__(self):
        interrupt()

def hook(event, args):
    if event == "import" and args[0] == module:
        {act}()

*sys.argv[1:], module = "demo", "--steps=1", *sys.argv[1:]
sys.addaudithook(hook)
runpy.run_module("jadam", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "act"),
    [
        ("jadam._cli.command_line", "interrupt"),
        ("jax", "InDestructor"),  # where Python drops a KeyboardInterrupt
        ("jaxlib._jax", "interrupt"),
        pytest.param("flax.nnx", "interrupt", marks=pytest.mark.slow),
        pytest.param("sklearn.datasets", "interrupt", marks=pytest.mark.slow),
        pytest.param("matplotlib.font_manager", "interrupt", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_while_it_starts(module, act, tmp_path):
    program = SIGINT_ON_IMPORT.format(act=act)
    command = [sys.executable, "-c", INTERRUPTIBLE, sys.executable, "-c", program, "--out=plot.png", module]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_env(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "jadam demo: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_postponed_while_files_are_written(tmp_path):
    program = "import os, signal, sys; from jadam._cli.interrupt import end_on_ctrl_c, postponed\n"
    program += "end_on_ctrl_c('jadam')\nwith postponed():\n  os.kill(os.getpid(), signal.SIGINT)\n  print('written')\n"
    command = [sys.executable, "-u", "-c", INTERRUPTIBLE, sys.executable, "-u", "-c", program + "print('never')"]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_env(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "written\n", "jadam: interrupted\n")


def test_missing_extras_are_one_line_and_exit_2(monkeypatch, capsys):
    for name in ("flax", "flax.nnx"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "jadam._cli.demo")
    monkeypatch.delattr("jadam._cli.demo")
    assert main(["demo"]) == 2
    assert capsys.readouterr() == ("", f"jadam demo: error: flax is not installed; run: {INSTALL}\n")


def test_a_full_disk_leaves_the_old_picture(capsys, monkeypatch):
    """See `test_faults.py` for other kinds of unwritable disks."""
    quick = lambda name, rate, *_: _demo.Run(
        name, rate, steps=[1], loss=[2.3], accuracy=[0.1], seconds=1.0, bytes_per_parameter=0.0
    )
    monkeypatch.setattr(_demo, "train", quick)
    with disks.limited() as (directory, unwritable):
        out = directory / "old.png"
        out.write_bytes(b"precious")
        with unwritable():
            assert main(["demo", "--steps", "1", "--out", str(out)]) == 2
        assert out.read_bytes() == b"precious"
        assert list(directory.iterdir()) == [out]
    assert capsys.readouterr().err == f"jadam demo: error: --out: cannot write {out}: {os.strerror(errno.EFBIG)}\n"


def test_help():
    result = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    for option in ("--lr", "--steps", "--seed", "--out"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (ModuleNotFoundError(name="sklearn.datasets"), 2, f"error: sklearn is not installed; run: {INSTALL}"),
        (_output.CommandError("no\nroom"), 2, "error: no room"),
        (OSError(28, "No space left on device"), 2, "error: cannot print: No space left on device"),
    ],
)
def test_what_stops_it_is_one_line_and_an_exit_code(raised, code, text, monkeypatch, capsys):
    def run(**options):
        raise raised

    monkeypatch.setattr(_demo, "run", run)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == f"jadam demo: {text}\n"
