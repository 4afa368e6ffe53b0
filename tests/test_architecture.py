"""The layers of `CONTRIBUTING.md`: each part of jadam imports only those above it in the table."""

import ast
import re
from pathlib import Path

import jadam

TOP = Path(jadam.__file__).parent
PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
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
