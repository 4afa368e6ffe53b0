"""Layers: each part of jadam imports only parts above it in `CONTRIBUTING.md`'s table. And the public namespace."""

import ast
import platform
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers import ROOT

import jadam
from jadam._cli.command_line import main

TOP = Path(jadam.__file__).parent
PAGE = ROOT / "CONTRIBUTING.md"
ENTRIES = ["__init__", "__main__"]  # entry points, above all layers
LAYERS = re.findall(r"`jadam/(\w+?)(?:\.py)?`", PAGE.read_text().split("| folder |")[1].split("\n\n")[0])


def imported(file):
    """Parts of jadam that a file imports, at module level or within functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jadam":
            names = [node.module] if "." in node.module else [f"jadam.{alias.name}" for alias in node.names]
            yield from (name.split(".")[1] for name in names)
        elif isinstance(node, ast.Import):
            yield from (x.name.split(".")[1] for x in node.names if x.name.startswith("jadam."))


def test_the_table_has_every_part():
    parts = {x.stem for x in TOP.iterdir() if x.suffix == ".py" or (x.is_dir() and x.name != "__pycache__")}
    assert sorted(LAYERS) == sorted(parts - set(ENTRIES))


def test_parts_import_only_those_above():
    wrong = [
        f"{file.relative_to(TOP)} imports {name}"
        for file in TOP.rglob("*.py")
        if (part := file.relative_to(TOP).parts[0].removesuffix(".py")) not in ENTRIES
        for name in imported(file)
        if LAYERS.index(name) > LAYERS.index(part)
    ]
    assert wrong == []


def test_import_and_help_do_not_load_jax():
    """Imports are lazy: neither JAX, NumPy nor Optax is loaded."""
    program = "import sys, jadam; dir(jadam); from jadam._cli.command_line import main\n"
    program += "try: main(['--help'])\nexcept SystemExit: "
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


def test_without_flax(monkeypatch):
    """`help`, which reads every attribute, works; and the remedy is one that a plain install can follow."""
    for name in [x for x in sys.modules if x.partition(".")[0] == "flax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, "jadam.flax", raising=False)
    monkeypatch.delitem(vars(jadam), "flax", raising=False)
    assert dir(jadam) == sorted(jadam.__all__)
    with pytest.raises(ImportError, match=r"jadam\.flax needs Flax: pip install flax\."):
        _ = jadam.flax
    pydoc.render_doc(jadam)


def test_version_prints_the_backends(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"jadam {jadam.__version__}"
    assert lines[1].startswith(f"Python {platform.python_version()}, jax {jax.__version__}, ")
    assert lines[2:] == [f"{name}: {backend}" for name, backend in jadam.backends().items()]
