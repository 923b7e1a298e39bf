"""A few kills of the cheapest commands, so that the campaigns in tests/campaigns stay in working order."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
CAMPAIGNS = Path(__file__).parent / "campaigns"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the campaign needs Linux")
def test_killed_commands_end_with_the_files_of_undisturbed_ones(tmp_path):
    """Each third kill comes at a random time, before an operation on files, or at the size of a file."""
    command = [sys.executable, CAMPAIGNS / "kills.py", "--kills", "3", "--out", tmp_path, "evaluate", "make-dataset"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("| 1 time, 1 operation, 1 size |") == 2 and run.stdout.count("| none |") == 2
