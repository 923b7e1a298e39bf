"""Short runs of the campaigns with the cheapest commands, so that tests/campaigns stays in working order."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
CAMPAIGNS = Path(__file__).parent / "campaigns"
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the campaigns need Linux")


def printed(*command):
    """Return what a campaign prints."""
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_killed_commands_end_with_the_files_of_undisturbed_ones(tmp_path):
    text = printed(CAMPAIGNS / "kills.py", "--kills", "3", "--out", tmp_path, "evaluate", "make-dataset")
    assert text.count("| 1 time, 1 operation, 1 size |") == text.count("| none |") == 2, text


def test_commands_end_with_the_same_files_after_a_full_disk(tmp_path):
    text = printed(CAMPAIGNS / "disks.py", "--attempts", "5", "--out", tmp_path, "make-dataset")
    if text.startswith("skipped"):
        pytest.skip(text)
    assert "3 No space left on device, 1 jumping clock, 1 Read-only file system" in text and "| none |" in text, text
