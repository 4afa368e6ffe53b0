"""Code blocks of README and CONTRIBUTING: Python runs here; shell commands must be in .ci/run."""

import importlib.metadata
import re

import pytest
import sybil.document
from helpers import ROOT, host_offload_reason
from sybil.parsers.markdown import PythonCodeBlockParser

README = ROOT / "README.md"
TEXT = README.read_text()
BOTH = TEXT + (ROOT / "CONTRIBUTING.md").read_text()


def python_blocks():
    """``{section and number within it: example}``."""
    blocks = {}
    for example in sybil.document.Document.parse(str(README), PythonCodeBlockParser()):
        section = re.findall(r"^## (.*)$", TEXT[: example.start], re.MULTILINE)[-1]
        number = 1 + sum(name.startswith(f"{section} ") for name in blocks)
        blocks[f"{section} {number}"] = example
    assert len(blocks) == TEXT.count("```python")
    return blocks


BLOCKS = python_blocks()


@pytest.mark.parametrize("example", BLOCKS.values(), ids=BLOCKS)
def test_python_blocks(example):
    """Each block runs on its own."""
    if "jax.memory.Space.Host" in example.parsed and (reason := host_offload_reason()):
        pytest.skip(reason)
    example.document.namespace.clear()
    example.evaluate()


def shell_commands():
    blocks = re.findall(r"```bash\n(.*?)```", BOTH, re.DOTALL)
    return list(dict.fromkeys(line.split("#")[0].strip() for block in blocks for line in block.splitlines()))


@pytest.mark.parametrize("command", shell_commands())
def test_shell_commands_are_run_by_ci_or_resolve(command):
    if extra := re.fullmatch(r"pip install \. 'jax\[(\w+)\]'", command):  # cannot run without an accelerator
        assert extra[1] in importlib.metadata.metadata("jax").get_all("Provides-Extra")
    else:
        assert command in (ROOT / ".ci" / "run").read_text().splitlines()


PATHS = re.findall(r"\]\((?!http)([^)]+)\)|`((?:jadam|tests|benchmarks|\.ci)/[\w./]*)`", BOTH)


@pytest.mark.parametrize("path", sorted({link or name for link, name in PATHS}))
def test_paths_exist(path):
    assert (ROOT / path).exists()


def test_the_installed_description_links_to_no_file():
    """Relative links would be broken on a package index."""
    found = importlib.metadata.metadata("jadam")
    text = found["Description"] or found.get_payload()
    assert text.startswith("# jadam")
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []


def test_the_lower_bounds_are_those_of_pyproject():
    bounds = re.findall(r"\b(jax|optax|flax) (\d+\.\d+\.\d+)", TEXT.split("with the oldest")[1])
    assert [name for name, _ in bounds] == ["jax", "optax", "flax"]
    for name, version in bounds:
        assert f'"{name}>={version}"' in (ROOT / "pyproject.toml").read_text()
