"""Short runs of the campaigns with the cheapest commands, so that tests/campaigns stays in working order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning")
CAMPAIGNS = Path(__file__).parent / "campaigns"
sys.path.append(str(CAMPAIGNS))
import disks  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the campaigns need Linux")


def printed(*command):
    """Return what a campaign prints."""
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if "a tmpfs cannot be mounted" in run.stderr:
        pytest.skip(run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_killed_commands_end_with_the_files_of_undisturbed_ones(tmp_path):
    text = printed(CAMPAIGNS / "kills.py", "--kills", "4", "--out", tmp_path, "evaluate", "make-dataset")
    assert text.count("| 1 time, 1 operation, 1 size, 1 Ctrl-C |") == text.count("| none |") == 2, text


def test_commands_end_with_the_same_files_after_a_full_disk(tmp_path):
    text = printed(CAMPAIGNS / "disks.py", "--attempts", "5", "--out", tmp_path, "make-dataset")
    assert "3 No space left on device, 1 jumping clock, 1 Read-only file system" in text and "| none |" in text, text


@pytest.mark.parametrize(
    ("first", "problem"), [({}, "data/a.json is missing"), ({"data/a.json": "{"}, "JSONDecodeError: .*")]
)
def test_success_with_a_missing_or_a_short_file_is_a_failure(first, problem, tmp_path, monkeypatch):
    runs = iter([first, {"data/a.json": "{}"}])  # of the disturbed run, and of the one after it

    def command(attempts, disturb=None):
        for name, text in next(runs).items():
            path = tmp_path / "run" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return 0, ""

    monkeypatch.setattr(disks.Attempts, "command", command)
    attempts = disks.Attempts("make-dataset", tmp_path, tmp_path, tmp_path, tmp_path / "out", 1)
    attempts.whole = {"data/a.json": {}}
    attempts.attempt(disks.KINDS.index(disks.CLOCK))
    (failure,) = attempts.failures
    assert re.fullmatch(f"attempt 2: ended with 0: {problem}", failure), failure


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["sgalign: out/f.json: No space left on device"], None),
        (["sgalign: 'f.json': No space left on device"], None),
        (["sgalign: cannot write the results: No space left on device"], "must name a file"),
        (["1/2 Motifs: FAILED: OSError: No space left on device, see /tmp/runs/log.txt"], "must name a file"),
        (["sgalign: something failed: [Errno 28] No space left on device"], "must name a file"),
        (["sgalign: out/f.json: No space left on device", "sgalign: it failed"], "more than one sentence"),
        (["Traceback (most recent call last):", "sgalign: out/f.json: No space left on device"], "a traceback"),
    ],
)
def test_a_full_disk_needs_one_sentence_that_names_a_file(lines, problem, tmp_path):
    attempts = disks.Attempts("evaluate", tmp_path, tmp_path, tmp_path, tmp_path, 1)
    problems = attempts._judge_output(1, "\n".join(lines), disks.FULL)
    assert [problem in found for found in problems] == ([True] if problem else [])
