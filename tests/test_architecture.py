"""The layers of `CONTRIBUTING.md`: each part of jadam imports only those above it in the table."""

import ast
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import ROOT

import jadam
from jadam.__main__ import main

TOP = Path(jadam.__file__).parent
PAGE = ROOT / "CONTRIBUTING.md"
ENTRIES = ["__init__", "__main__"]  # import what is public
LAYERS = re.findall(r"`jadam/(\w+?)(?:\.py)?`", PAGE.read_text().split("| folder |")[1].split("\n\n")[0])


def imported(file):
    """The parts of jadam that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jadam":
            names = [node.module] if "." in node.module else [f"jadam.{alias.name}" for alias in node.names]
            yield from (name.split(".")[1] for name in names)
        elif isinstance(node, ast.Import):
            yield from (x.name.split(".")[1] for x in node.names if x.name.startswith("jadam."))


def test_the_table_has_every_part():
    parts = {x.stem for x in TOP.iterdir() if x.suffix == ".py" or (x.is_dir() and x.name != "__pycache__")}
    assert sorted(LAYERS) == sorted(parts - set(ENTRIES))


def test_each_part_uses_only_those_above_it():
    wrong = [
        f"{file.relative_to(TOP)} imports {name}"
        for file in TOP.rglob("*.py")
        if (part := file.relative_to(TOP).parts[0].removesuffix(".py")) not in ENTRIES
        for name in imported(file)
        if LAYERS.index(name) > LAYERS.index(part)
    ]
    assert wrong == []


def test_importing_jadam_and_asking_for_help_import_no_jax():
    """Nor NumPy: names are imported when they are used."""
    program = (
        "import sys, jadam; dir(jadam); from jadam.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: "
    )
    program += "print(sorted({'jax', 'numpy', 'optax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=TOP.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_dir_has_the_public_names_and_no_others():
    assert dir(jadam) == sorted({*jadam.__all__, "flax"})
    assert not [name for name in dir(jadam) if name.startswith("_")]
    for name in jadam.__all__:
        assert getattr(jadam, name) is not None
    with pytest.raises(AttributeError, match="jax"):
        _ = jadam.jax


def test_version_tells_what_serves(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"jadam {jadam.__version__}"
    assert lines[1].startswith(f"Python {platform.python_version()}, jax {jax.__version__}, ")
    assert lines[2:] == [f"{name}: {backend}" for name, backend in jadam.backends().items()]
