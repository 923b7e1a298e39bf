"""Runs every target of the data sets' fuzzing on some random inputs, so that the code of the campaign stays valid."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("atheris", reason="atheris has packages for Linux on x86-64 and Python 3.11 to 3.13 only")
pytest.importorskip("h5py")
# Already imported modules are not instrumented. Instrumented ones would slow down the other tests of this process.
import sgalign.data.coco_writing  # noqa: E402
import sgalign.data.open  # noqa: E402, F401

sys.path.insert(0, str(Path(__file__).parent / "campaigns"))
import fuzz_datasets  # noqa: E402
from fuzzing import Draw, judged  # noqa: E402


@pytest.mark.parametrize("name", fuzz_datasets.TARGETS)
def test_a_target_finds_no_defect_in_some_random_inputs(name, tmp_path):
    outcomes = Counter()
    for seed in range(20):
        (folder := tmp_path / str(seed)).mkdir()
        try:
            word = fuzz_datasets.TARGETS[name](Draw(random.Random(seed).randbytes(2000)), folder) or "loaded"
        except Exception as error:
            word = judged(error, str(folder))
        assert not word.startswith("DEFECT"), f"input of seed {seed}: {word}"
        outcomes[word] += 1
    assert outcomes["loaded"] and outcomes["refused"], outcomes
