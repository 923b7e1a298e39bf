"""Tests that the targets of `tests/campaigns/fuzz_files.py` still run, each on a few inputs of random bytes."""

import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 and Python 3.11 to 3.13 only")
pytest.importorskip("torchmetrics")
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz_files  # noqa: E402
from fuzzing import run  # noqa: E402

INPUTS = {"published_sgtr": 2}  # of 20; each builds two networks


@pytest.mark.parametrize("name", fuzz_files.TARGETS)
def test_a_target_loads_its_unchanged_file_and_finds_no_defect(name):
    generator, target = random.Random(1), fuzz_files.TARGETS[name]
    assert run(target, b"") == ("loaded", None)
    outcomes = {run(target, generator.randbytes(400))[0] for _ in range(INPUTS.get(name, 20))}
    assert outcomes <= {"loaded", "refused"}


def test_a_pickle_that_runs_something_is_a_defect(monkeypatch):
    monkeypatch.setattr(fuzz_files, "read_tensors", lambda path, _: torch.load(path, weights_only=False))
    assert run(fuzz_files.TARGETS["tensors"], b"")[0].startswith("DEFECT AssertionError at assertion: reading caused")
