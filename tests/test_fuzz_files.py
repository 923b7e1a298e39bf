"""Tests that the targets of `tests/campaigns/fuzz_files.py` still run, each on a few inputs of random bytes."""

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 and Python 3.11 to 3.13 only")
pytest.importorskip("torchmetrics")
sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz_files  # noqa: E402
from fuzzing import Draw, judged  # noqa: E402

INPUTS = {"published_sgtr": 2}  # of 20; each builds two networks


@pytest.mark.parametrize("name", fuzz_files.TARGETS)
def test_a_target_finds_no_defect(name, tmp_path):
    generator = random.Random(1)
    outcomes = []
    for number in range(INPUTS.get(name, 20)):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            outcomes.append(fuzz_files.TARGETS[name](Draw(generator.randbytes(400)), folder) or "loaded")
        except Exception as error:
            outcomes.append(judged(error, str(folder)))
            if outcomes[-1] != "refused":
                raise
    assert set(outcomes) <= {"loaded", "refused"}
