"""Tests that the targets of `tests/campaigns/fuzz_files.py` still run, each on a few inputs of random bytes."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 and Python 3.11 to 3.13 only")
pytest.importorskip("torchmetrics")
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz_files  # noqa: E402
from fuzzing import run  # noqa: E402

INPUTS = {"published_sgtr": 2}  # of 20; each builds two networks


@pytest.mark.parametrize("name", fuzz_files.TARGETS)
def test_a_target_finds_no_defect(name):
    generator = random.Random(1)
    outcomes = {run(fuzz_files.TARGETS[name], generator.randbytes(400))[0] for _ in range(INPUTS.get(name, 20))}
    assert outcomes <= {"loaded", "refused"}
