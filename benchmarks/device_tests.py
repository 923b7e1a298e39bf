"""The parts "tests" and "sanitizer" of the GPU report, which run the operations' tests in pytest processes."""

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
from typing import NamedTuple

from benchmarks import measuring
from benchmarks.measuring import ROOT, Figures
from benchmarks.record import OURS, Record, digest
from benchmarks.report_markdown import NOT_REACHED

TEST_FILES = ("tests/test_attention.py", "tests/test_relation.py", "tests/test_alignment.py", "tests/test_gpu.py")
PYTEST = (sys.executable, "-m", "pytest", "--tb=line", "-p", "no:cacheprovider")
SANITIZER_EXIT = 9  # exit status of compute-sanitizer if it has found an error
SANITIZER_MARK = "========= "
SANITIZER_FINDS = SANITIZER_MARK + r"(Invalid|Misaligned|Uninitialized|Race|Barrier|Program hit|.*SUMMARY: [1-9])"
DEVICE_LOST = 7  # exit status of pytest after an illegal access, set by tests/conftest.py
SANITIZED = "test_each_branch_equals_a_single_branch or test_rows_without_a_kept_entry"
CHOSEN: tuple[str, ...] = ()  # options of pytest that select tests
CODE = (
    "benchmarks/device_tests.py",
    "tests/conftest.py",
    "tests/target.py",
    "tests/accuracy.py",
    "tests/covers.py",
    *TEST_FILES,
)


class Suite(NamedTuple):
    """Tests of one backend that run with the same command."""

    backend: str
    watched: tuple[str, ...] = ()  # the command that runs and watches pytest
    chosen: tuple[str, ...] = ()
    pieces: int = min(12, os.cpu_count() or 1)


def run(record: Record) -> None:
    """Run the operations' tests on the device, for every backend."""
    run_suites(record, {name: Suite(name) for name in measuring.available()})


def run_sanitized(record: Record) -> None:
    """Run a few tests of the CUDA backend under compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and "cuda" in measuring.available():
        watched = (sanitizer, f"--error-exitcode={SANITIZER_EXIT}")
        run_suites(record, {"cuda under compute-sanitizer": Suite("cuda", watched, ("-k", SANITIZED), pieces=1)})


def run_suites(record: Record, suites: dict[str, Suite]) -> None:
    """Divide the suites into pieces and run these in parallel, because most of the time is compilation.

    "not run" lists the tests for which no time was left. A resumed run runs only these.
    """
    for name, suite in suites.items():
        depends = digest(*CODE, *OURS[suite.backend])
        known = record.known.get(name, {})
        record.figures[name] = known if known.get("sources") == depends else {"failure": NOT_REACHED}
        record.figures[name]["sources"] = depends
    if time.monotonic() > record.deadline:
        return
    started: list[tuple[str, list[str], subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        interrupted = False
        try:
            for name, suite in suites.items():
                known = record.figures[name]
                known = known if "counts" in known else collected(suite) | {"sources": known["sources"]}
                record.figures[name] = known | {"counts": Counter(known["counts"])}
                for piece in range(suite.pieces):
                    if ids := known["not run"][piece :: suite.pieces]:
                        log = Path(folder, f"{name} {piece}")
                        started.append(
                            (name, ids, start([*suite.watched, *PYTEST, "-v", *ids], suite.backend, log), log)
                        )
            for _, _, process, _ in started:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.1, record.deadline - time.monotonic()))
        except KeyboardInterrupt:  # the tests that have run until now still count
            interrupted = True
        finally:  # leaves no process on the device
            statuses = [stop(process) for _, _, process, _ in started]
        for (name, ids, _, log), status in zip(started, statuses):
            counts, failed, left = outcomes(log.read_text(errors="replace"), status, ids, interrupted)
            found = record.figures[name]
            not_run = [test for test in found["not run"] if test not in ids] + left
            found |= {"counts": found["counts"] + counts, "failed": found["failed"] + failed, "not run": not_run}
    if interrupted:
        raise KeyboardInterrupt


def start(command: Sequence[str], backend: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in its own process group, because compute-sanitizer has children."""
    with log.open("w") as output:  # not a pipe, which could fill up while we wait for another process
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(backend), stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Kill a process and its whole group. Return its status, or None if it was still running."""
    status = process.poll()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def collected(suite: Suite) -> Figures:
    """Return the figures before the tests run: the tests' ids, and pytest's errors in collecting them."""
    listing = [*PYTEST, "-q", "--collect-only", *CHOSEN, *suite.chosen, *TEST_FILES]
    listed = subprocess.run(listing, cwd=ROOT, env=environment(suite.backend), capture_output=True, text=True)
    lines = (listed.stdout + listed.stderr).splitlines()
    failed = [line[:300] for line in lines if line.startswith(("ERROR", "E  "))] or lines[-3:]
    ids = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    return {"counts": {}, "failed": failed if listed.returncode else [], "not run": ids}


def outcomes(
    log: str, status: int | None, ids: Sequence[str], interrupted: bool = False
) -> tuple[Counter[str], list[str], list[str]]:
    """Return the number of tests by outcome, lines that describe the failures, and the tests that were not run.

    `status` is None if time was up or ctrl-C came. If the run died, the first test without an outcome counts as failed.
    If time was up before any test had an outcome, the first test counts as failed.
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
    if died or (status is None and left == list(ids) and not interrupted):
        said = f"pytest ended with status {status}" if died else "time was up"
        failed.append(f"{said} in {left[0] if left else 'the end'}: {lines[-1][:200] if lines else ''}")
        left = left[1:]
    return Counter(map(str.lower, outcome_of.values())), failed, [] if status in (0, 1, SANITIZER_EXIT) else left


def environment(backend: str) -> dict[str, str]:
    """Return this process's environment with the backend that the operations' tests use."""
    return os.environ | {"SGALIGN_TEST_BACKEND": backend}
