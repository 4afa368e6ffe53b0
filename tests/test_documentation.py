"""README and documentation: Python blocks run, shell commands are run by CI or exist, public names have a place."""

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import sybil.document
from golden import where
from helpers import ROOT, host_offload_reason, parametrize
from sybil.parsers.markdown import PythonCodeBlockParser

from jadam._cli.command_line import _parser

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 130


def python_blocks(page):
    """``{page, nearest heading and number: example}``."""
    text, blocks = TEXTS[page], {}
    for example in sybil.document.Document.parse(str(ROOT / page), PythonCodeBlockParser()):
        heading = re.findall(r"^#+ (.*)$", text[: example.start], re.MULTILINE)[-1]
        number = 1 + sum(name.startswith(f"{page}: {heading} ") for name in blocks)
        blocks[f"{page}: {heading} {number}"] = example
    assert len(blocks) == text.count("```py")
    return blocks


BLOCKS = {name: example for page in TEXTS for name, example in python_blocks(page).items()}


SLOW = (  # blocks that compile much; README's all run by default
    "docs/accuracy.md: Does the difference to Optax change my training? 1",
    "docs/how_to/checkpoints.md: Change the format in a running training, add exact_bf16 or record 1",
    "docs/how_to/equinox.md: Equinox: bfloat16 weights with int8 moments 1",
    "docs/how_to/flax_nnx.md: Switch an Optax run to exact_bf16 and int8 1",
    "docs/how_to/flax_nnx.md: The training loop 1",
    "docs/how_to/many_devices.md: FSDP with Flax NNX, with checkpoints 1",
    "docs/memory.md: How int8 works 1",
    "docs/quickstart.md: Change one import 1",
)


@parametrize("example", BLOCKS, default=[name for name in BLOCKS if name not in SLOW])
def test_python_blocks(example, tmp_path, monkeypatch):
    """Each block runs on its own."""
    if "jax.memory.Space.Host" in example.parsed and (reason := host_offload_reason()):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    example.document.namespace.clear()
    example.evaluate()


def shell_commands():
    """Lines of all ``bash`` blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(TEXTS.values()), re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def is_valid(command: str) -> bool:
    """Whether the program and the files, modules, extras and options of a command exist."""
    program, *arguments = shlex.split(re.sub(r"^(\w+=\S+ )+", "", command))
    if program == "pip":
        extras = re.findall(r"^(\w+) = \[", PYPROJECT.split("optional-dependencies]")[1], re.MULTILINE)
        jax_extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
        known = {"install", "-e", ".", "orbax-checkpoint", "equinox", "safetensors", "jupyterlab", "--force-reinstall"}
        known |= {"--no-deps", "--no-cache-dir", *(f".[{x}]" for x in extras), *(f"jax[{x}]" for x in jax_extras)}
        return set(arguments) <= known
    if program == "jadam":
        parser = argparse.ArgumentParser(parents=[_parser()], add_help=False)
        return arguments == ["--version"] or parser.parse_args(arguments).command == arguments[0]
    if program == "jupyter":
        return arguments[0] == "lab" and all((ROOT / x).exists() for x in arguments[1:])
    if program == "pytest":
        return all((ROOT / x).exists() for x in arguments if x.startswith("tests/"))
    if program == "python":
        file, module = (arguments[0], "") if arguments[0] != "-m" else ("", arguments[1])
        return (ROOT / file).exists() and (not module or importlib.util.find_spec(module) is not None)
    return False


@pytest.mark.parametrize("command", shell_commands())
def test_shell_commands_are_run_by_ci_or_valid(command):
    assert command in CI.splitlines() or is_valid(command)


PATH = re.compile(r"`((?:jadam|tests|benchmarks|notebooks|\.ci)/[\w./]*)`|\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)")


def paths():
    """Files that pages name or link to."""
    for page, text in TEXTS.items():
        for name, link in PATH.findall(text):
            target = ROOT / name if name else (ROOT / page).parent / link
            if "notebooks/" in link and page.startswith("docs/"):  # copied there by docs/conf.py
                target = ROOT / "notebooks" / Path(link).name
            yield f"{page}: {name or link}", target


@pytest.mark.parametrize("target", dict(paths()).values(), ids=dict(paths()))
def test_paths_exist(target):
    assert target.exists()


def test_every_public_name_has_a_place_in_the_api():
    api = "\n".join(text for page, text in TEXTS.items() if page.startswith("docs/api/"))
    documented = set()
    for module, directives in re.findall(r"currentmodule:: (\S+)\n(.*?)```", api, re.DOTALL):
        documented |= {f"{module}.{name}" for name in re.findall(r"auto\w+:: (\w+)", directives)}
    names = set(where.public_names()) - {"jadam.flax", "jadam.sharding", "jadam.torch_state"}
    assert names - documented == set()
    assert {x for x in documented if not x.split(".")[-1].isupper()} - names == set()


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page, text in TEXTS.items():
        for toctree in re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL):
            entries = re.findall(r"^(?!:)(\S+)$", toctree, re.MULTILINE)
            listed |= {(Path(page).parent / x).as_posix() for x in entries}
    pages = {page.removesuffix(".md") for page in TEXTS if page.startswith("docs/")} - {"docs/index"}
    notebooks = {f"docs/notebooks/{x.stem}" for x in (ROOT / "notebooks").glob("*.ipynb")}
    assert listed == pages | notebooks


def test_the_installed_description_links_to_no_file():
    """Relative links would be broken on a package index."""
    found = importlib.metadata.metadata("jadam")
    text = found["Description"] or found.get_payload()
    assert text.startswith("# jadam")
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", text) == []


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "docs/reliability.md"])
def test_the_lower_bounds_are_those_of_pyproject(page):
    text = TEXTS[page].split("oldest", 1)[1]
    for name in ("jax", "optax", "flax"):
        version = re.search(rf"\b{name}\b[^\n|\d]*\|? ?(\d+\.\d+\.\d+)", text, re.IGNORECASE)[1]
        assert f'"{name}>={version}"' in PYPROJECT


def test_one_version_and_title():
    version, citation = importlib.metadata.version("jadam"), (ROOT / "CITATION.cff").read_text()
    title = re.search(r'^title: "(.*)"$', citation, re.MULTILINE)[1]
    assert f"{{{title}}}" in TEXTS["docs/faq.md"]
    assert f"\nversion: {version}\n" in citation
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def message_texts():
    """Every text that jadam may print: the golden ones, and the literals of the source with ... for values."""
    texts = list(json.loads((ROOT / "tests" / "golden" / "errors.json").read_text()).values())
    for path in (ROOT / "jadam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(x.value if isinstance(x, ast.Constant) else "..." for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_headings_of_the_faq_begin_messages():
    """A heading in code font is the beginning of a message, or a part of one if it begins with a value or "error:"."""
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(headings) > 30
    texts = message_texts()
    for heading in headings:
        pattern = re.compile(".*?".join(map(re.escape, heading.split("..."))))
        assert any(map(pattern.match, texts)), heading
