"""A part of `make reproduce-small`: detectors, studies and report on generated data in VG150's layout."""

import os
import subprocess
import sys

import pytest
from target import ROOT

pytest.importorskip("lightning")


@pytest.mark.slow
def test_a_part_of_the_reproduction_runs(tmp_path):
    environment = os.environ | {"SGALIGN": f"{sys.executable} -m sgalign", "SEEDS": "1", "STUDIES": "motifs sgtr"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "examples" / "reproduce_small.sh"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    text = (tmp_path / "studies" / "report.md").read_text()
    for row in ("Motifs, PredCls", "Align-Motifs, SGCls", "Align-Motifs, SGDet", "SGTR", "Align-SGTR"):
        assert f"| {row} | 1 |" in text
    assert (tmp_path / "studies" / "report.html").read_text().count("data:image/png") == 5
