"""The GPU report's parts "tests" and "sanitizer": the operations' own tests, by pytest in processes of their own."""

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
SANITIZER_EXIT = 9  # of compute-sanitizer where it has found something
SANITIZER_MARK = "========= "
SANITIZER_FINDS = SANITIZER_MARK + r"(Invalid|Misaligned|Uninitialized|Race|Barrier|Program hit|.*SUMMARY: [1-9])"
DEVICE_LOST = 7  # of pytest, as tests/conftest.py ends it after an illegal access
SANITIZED = "test_each_branch_is_the_single_one or test_rows_with_nothing_kept"
CHOSEN: tuple[str, ...] = ()  # pytest's options that choose among the tests
CODE = ("benchmarks/device_tests.py", "tests/conftest.py", "tests/target.py", "tests/accuracy.py", *TEST_FILES)


class Suite(NamedTuple):
    """Tests of one backend that run with the same command."""

    backend: str
    watched: tuple[str, ...] = ()  # the command that watches pytest
    chosen: tuple[str, ...] = ()
    pieces: int = min(12, os.cpu_count() or 1)


def run(record: Record) -> None:
    """Run the operations' tests on the device, for every backend."""
    run_suites(record, {name: Suite(name) for name in measuring.available()})


def run_sanitized(record: Record) -> None:
    """Run a few of them under compute-sanitizer, which knows the CUDA backend's kernels."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and "cuda" in measuring.available():
        watched = (sanitizer, f"--error-exitcode={SANITIZER_EXIT}")
        run_suites(record, {"cuda under compute-sanitizer": Suite("cuda", watched, ("-k", SANITIZED), pieces=1)})


def run_suites(record: Record, suites: dict[str, Suite]) -> None:
    """Run suites in pieces side by side, since compiling takes longest.

    "not run" has those that time did not reach, which are all that a run that goes on does.
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
        except KeyboardInterrupt:  # what has run by now is not lost
            interrupted = True
        finally:  # nothing stays on the device
            statuses = [stop(process) for _, _, process, _ in started]
        for (name, ids, _, log), status in zip(started, statuses):
            counts, failed, left = outcomes(log.read_text(errors="replace"), status, ids, interrupted)
            found = record.figures[name]
            not_run = [test for test in found["not run"] if test not in ids] + left
            found |= {"counts": found["counts"] + counts, "failed": found["failed"] + failed, "not run": not_run}
    if interrupted:
        raise KeyboardInterrupt


def start(command: Sequence[str], backend: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, since compute-sanitizer has children."""
    with log.open("w") as output:  # not a pipe, which fills up while another process is waited for
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(backend), stdout=output, stderr=output, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """Kill a process and all of its group; return the status of one that had ended by itself."""
    status = process.poll()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return status


def collected(suite: Suite) -> Figures:
    """Return what is known of the tests before they run: their ids, and what keeps pytest from collecting them."""
    listing = [*PYTEST, "-q", "--collect-only", *CHOSEN, *suite.chosen, *TEST_FILES]
    listed = subprocess.run(listing, cwd=ROOT, env=environment(suite.backend), capture_output=True, text=True)
    lines = (listed.stdout + listed.stderr).splitlines()
    failed = [line[:300] for line in lines if line.startswith(("ERROR", "E  "))] or lines[-3:]
    ids = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    return {"counts": {}, "failed": failed if listed.returncode else [], "not run": ids}


def outcomes(
    log: str, status: int | None, ids: Sequence[str], interrupted: bool = False
) -> tuple[Counter[str], list[str], list[str]]:
    """Return how many tests passed, failed, ...; lines that say what failed; and which tests were not run.

    `status` is None where time was up or ctrl-C came. A run that died has failed at the first test without an outcome,
    and one that had time for no test at its first.
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
        said = f"status {status}" if died else "time was up"
        failed.append(f"{said} in {left[0] if left else 'the end'}: {lines[-1][:200] if lines else ''}")
        left = left[1:]
    return Counter(map(str.lower, outcome_of.values())), failed, [] if status in (0, 1, SANITIZER_EXIT) else left


def environment(backend: str) -> dict[str, str]:
    """Return this process's environment with the backend that the operations' tests run."""
    return os.environ | {"SGALIGN_TEST_BACKEND": backend}
