"""The GPU report's part "tests": the operations' own tests on the device, by pytest in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks import measuring
from benchmarks.measuring import Figures

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 170
TEST_FILES = ("tests/test_attention.py", "tests/test_relation.py", "tests/test_alignment.py", "tests/test_gpu.py")
PYTEST = (sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider")
SANITIZER_EXIT = 9  # of compute-sanitizer where it has found something
SANITIZER_MARK = "========= "
SANITIZER_FINDS = SANITIZER_MARK + r"(Invalid|Misaligned|Uninitialized|Race|Barrier|Program hit|.*SUMMARY: [1-9])"
DEVICE_LOST = 7  # of pytest, as tests/conftest.py ends it after an illegal access
SANITIZED = "test_each_branch_is_the_single_one or test_rows_with_nothing_kept"


def run(before: Figures) -> Figures:
    """Run the operations' tests on the device, in pieces side by side, since compiling takes longest.

    "not run" has those that time did not reach, which are all that a run that goes on does.
    """
    deadline = time.monotonic() + SECONDS
    sanitizer = shutil.which("compute-sanitizer")
    found: Figures = {}
    started: list[tuple[str, list[str], subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in measuring.available():
                suites: dict[str, list[str]] = {name: []}
                if name == "cuda" and sanitizer:
                    suites["cuda under compute-sanitizer"] = [sanitizer, f"--error-exitcode={SANITIZER_EXIT}"]
                for suite, watched in suites.items():
                    known = before.get(suite) or collected(name, ["-k", SANITIZED] if watched else [])
                    found[suite] = {"counts": Counter(known["counts"]), "failed": [*known["failed"]], "not run": []}
                    pieces = 1 if watched else min(12, os.cpu_count() or 1)
                    for piece in range(pieces):
                        if ids := known["not run"][piece::pieces]:
                            log = Path(folder, f"{suite} {piece}")
                            started.append((suite, ids, start([*watched, *PYTEST, "-v", *ids], name, log), log))
            for suite, ids, process, log in started:
                status: int | None = None
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(max(1.0, deadline - time.monotonic()))
                stop(process)
                counts, failed, left = outcomes(log.read_text(errors="replace"), status, ids)
                found[suite]["counts"] += counts
                found[suite]["failed"] += failed
                found[suite]["not run"] += left
        finally:  # interrupted: nothing stays on the device
            for _, _, process, _ in started:
                stop(process)
    return found


def start(command: Sequence[str], backend: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, since compute-sanitizer has children."""
    with log.open("w") as output:  # not a pipe, which fills up while another process is waited for
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(backend), stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def collected(backend: str, chosen: Sequence[str]) -> Figures:
    """Return what is known of the tests before they run: their ids, and what keeps pytest from collecting them."""
    listing = [*PYTEST, "-q", "--collect-only", *chosen, *TEST_FILES]
    listed = subprocess.run(listing, cwd=ROOT, env=environment(backend), capture_output=True, text=True)
    lines = (listed.stdout + listed.stderr).splitlines()
    failed = [line[:300] for line in lines if line.startswith(("ERROR", "E  "))] or lines[-3:]
    ids = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    return {"counts": {}, "failed": failed if listed.returncode else [], "not run": ids}


def outcomes(log: str, status: int | None, ids: Sequence[str]) -> tuple[Counter[str], list[str], list[str]]:
    """Return how many tests passed, failed, ...; lines that say what failed; and which tests were not run.

    `status` is None where time was up. A run that died has failed at the first test without an outcome, and one that
    had time for no test at its first.
    """
    lines = log.splitlines()
    of_pytest = "\n".join(line for line in lines if not line.startswith(SANITIZER_MARK))
    outcome_of = dict(re.findall(r"^(\S+::.*?)\s+(PASSED|FAILED|SKIPPED|ERROR)\b", of_pytest, re.MULTILINE))
    failed = [line[:300] for line in lines if re.match(r"(FAILED|ERROR) \S+\.py", line)]  # with the reason, at the end
    failed = failed or [f"{outcome} {name}" for name, outcome in outcome_of.items() if outcome in ("FAILED", "ERROR")]
    failed += [line for line in lines if re.match(SANITIZER_FINDS, line)][:20]
    if status == DEVICE_LOST:
        failed.append(f"the device was lost in {next(reversed(outcome_of), 'the beginning')}")
    left = [name for name in ids if name not in outcome_of]
    died = status not in (None, 0, 1, SANITIZER_EXIT, DEVICE_LOST)
    if died or (status is None and left == list(ids)):
        said = f"status {status}" if died else "time was up"
        failed.append(f"{said} in {left[0] if left else 'the end'}: {lines[-1][:200] if lines else ''}")
        left = left[1:]
    return Counter(map(str.lower, outcome_of.values())), failed, [] if status in (0, 1, SANITIZER_EXIT) else left


def environment(backend: str) -> dict[str, str]:
    """Return this process's environment with the backend that the operations' tests run."""
    return os.environ | {"SGALIGN_TEST_BACKEND": backend}
