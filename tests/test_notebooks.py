"""Every notebook runs from top to bottom in a Jupyter kernel, and is committed with its outputs."""

import nbformat
import pytest
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, monkeypatch):
    from nbclient import NotebookClient

    for name in ("MPLBACKEND", "XLA_FLAGS"):  # set by the tests
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    committed = pictures(notebook)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}})
    client.execute()  # raises the first exception of a cell
    assert not [x.text for x in outputs(notebook) if x.output_type == "stream" and x.name == "stderr"]
    assert pictures(notebook) == committed > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_outputs(path):
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output.output_type == "error" for output in outputs(notebook))
    assert notebook.cells[0].source.startswith("# ")
    assert "At the end you will" in notebook.cells[0].source
    assert path.stat().st_size < 400_000


def test_numbers_of_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
