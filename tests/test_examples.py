"""The examples of models with a mirror run, learn and print what the mirror costs."""

import re
import runpy
import sys

import pytest
from target import ROOT

pytest.importorskip("torchvision")
EXAMPLES = sorted((ROOT / "examples").glob("align_*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_trains_and_prints_the_cost_of_the_mirror(path, monkeypatch, capsys):
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [path.name, "--steps", "20"])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = re.findall(r"supervised loss ([\d.]+), weighted alignment loss [\d.]+", printed)
    assert float(last) < float(first)
    for row in ("without a mirror", r"the plain way \(decoder called twice\)", "with sgalign's mirror"):
        assert re.search(rf"{row} +[\d.]+ ms +[\d.]+\n", printed), printed
    assert len(path.read_text().splitlines()) < 150


def test_all_examples_are_listed():
    page = (ROOT / "docs" / "align_your_model.md").read_text()
    assert len(EXAMPLES) == 4 and all(f"(../examples/{path.name})" in page for path in EXAMPLES)
