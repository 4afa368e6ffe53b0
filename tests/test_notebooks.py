"""Every notebook runs from top to bottom in a Jupyter kernel, and is committed with its outputs."""

import base64
import io
import re

import nbformat
import PIL.Image
import pytest
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def run(notebook, folder, monkeypatch):
    """Execute all cells; raises the first exception of a cell, and if anything is written to stderr."""
    from nbclient import NotebookClient

    for name in ("MPLBACKEND", "XLA_FLAGS"):  # set by the tests
        monkeypatch.delenv(name, raising=False)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    assert not [x.text for x in outputs(notebook) if x.output_type == "stream" and x.name == "stderr"]


def read(name):
    (path,) = (path for path in NOTEBOOKS if name in path.stem)
    return nbformat.read(path, nbformat.NO_CONVERT)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    committed = pictures(notebook)
    run(notebook, path.parent, monkeypatch)
    assert pictures(notebook) == committed > 0


@pytest.mark.slow
def test_the_claims_run_outside_of_a_clone(tmp_path, monkeypatch):
    """The live pictures are there; for each other one a sentence says where it is."""
    notebook = read("claims")
    committed = pictures(notebook)
    run(notebook, tmp_path, monkeypatch)
    missing = [x.text for x in outputs(notebook) if x.output_type == "stream" and "is not shown: it is in" in x.text]
    assert len(missing) == 6
    assert pictures(notebook) == committed - 6 > 0


# Moves each slider, and prints whether the path changed and how often it was traced.
MOVE = """
for name, value in {"learning_rate": 0.05, "b1": 0.5, "b2": 0.9, "eps": 0.1}.items():
    before = path_figure.axes[0].lines[-1].get_xydata()
    sliders[name].value = value
    print(name, np.array_equal(path_figure.axes[0].lines[-1].get_xydata(), before), traces)
"""


@pytest.mark.slow
def test_sliders_of_the_playground(monkeypatch):
    """Moving one changes the picture and compiles nothing, also after all other cells."""
    notebook = read("playground")
    (cell,) = (cell for cell in notebook.cells if "FloatLogSlider(" in cell.source)
    (committed,) = cell.outputs
    notebook.cells.append(nbformat.v4.new_code_cell(MOVE))
    run(notebook, ROOT / "notebooks", monkeypatch)
    printed = "".join(x.text for x in notebook.cells[-1].outputs if x.output_type == "stream")
    assert printed.splitlines() == [f"{name} False 1" for name in ("learning_rate", "b1", "b2", "eps")]
    *_, shown = cell.outputs
    assert shown.data["image/png"] != committed.data["image/png"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_outputs(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert notebook.cells[0].source.startswith("# ")
    assert "At the end you will" in notebook.cells[0].source
    assert path.stat().st_size < 600_000
    assert "widgets" not in notebook.metadata  # a page without a kernel cannot show them


def test_notebooks_use_public_names():
    for path in NOTEBOOKS:
        code = "\n".join(cell.source for cell in nbformat.read(path, nbformat.NO_CONVERT).cells)
        assert not re.search(r"jadam(\.\w+)*\._[a-z]", code), path.stem


def test_the_animation_plays_without_network():
    """It is an embedded GIF of many frames, and is less than 250 kB."""
    (gif,) = (x.data["image/gif"] for x in outputs(read("playground")) if "image/gif" in x.get("data", {}))
    gif = base64.b64decode(gif)
    assert PIL.Image.open(io.BytesIO(gif)).n_frames > 10
    assert len(gif) < 250_000


def test_numbers_of_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]
