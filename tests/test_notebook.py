"""A check that the notebook in examples/ runs, from the first cell to the drawn scene graph."""

import ast

import pytest
from target import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.mark.slow
def test_the_notebook_runs_and_draws(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600).execute()  # raises if a cell does
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]
    assert pictures.count(True) == 3 and pictures[-1]
    recall = next(ast.literal_eval(cell.outputs[-1]["data"]["text/plain"]) for cell in cells if "recall" in cell.source)
    assert recall["Align-Motifs"] > recall["frequency"] + 0.05
