"""Fill the disk of a command's output at random points, or make it read-only, and check what the command leaves.

The command must end with one sentence that names a file and the reason. Older output stays, no file may be half, and
no partial file may be left. When there is space again, the same command must give the files of an undisturbed run.
In some attempts, the clock that Python reads jumps by days instead, which must change nothing. The disk is a tmpfs.
To mount it, run this as root or with `unshare -rm`.

    python tests/campaigns/disks.py --attempts 20 --seed 1 predict evaluate
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import small_runs

SIZE = 20 << 20
# The file is named behind the reason, or in our sentence in quotes or as a path.
SENTENCE = r"{reason}: '.+'|sgalign: (?=.*(?:'.+'|\S/\S))[^[]+: .*{reason}"
FULL, READ_ONLY, CLOCK = "No space left on device", "Read-only file system", "jumping clock"
KINDS = (FULL, FULL, CLOCK, FULL, READ_ONLY)  # of five attempts
DAYS = (0, 3, -3, 0, -40, 40)  # by which the clock is wrong, one after the other
OLD = {"evaluate": ("out/f.json", "out/f.csv"), "predict": ("out/g.html",)}  # output of an earlier command
OLD_CONTENT = '"from an earlier run"\n'


class Attempts:
    """The attempts of one command.

    Args:
        name: name of the command.
        inputs: folder with the inputs of all commands.
        work: folder for logs.
        disk: folder on which a tmpfs is mounted.
        out: folder for the files of failed runs.
        seed: seed of the attempts.
    """

    def __init__(self, name: str, inputs: Path, work: Path, disk: Path, out: Path, seed: int) -> None:
        self.name, self.inputs, self.work, self.disk, self.out = name, inputs, work, disk, out
        self.random = random.Random(f"{seed} {name}")
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []

    def command(self, disturb: Callable[[], None] = lambda: None) -> tuple[int | None, str]:
        """Run the command in the folder of the disk, and return its exit code and its output."""
        beside = self.work / "beside"
        shutil.rmtree(beside, ignore_errors=True)
        pid = small_runs.start(self.name, self.inputs, self.disk / "run", disturb, beside)
        return small_runs.wait(pid), (beside / small_runs.LOG).read_text()

    def measure(self) -> None:
        """Run the command undisturbed and note its files and how much space they take."""
        before = os.statvfs(self.disk)
        code, output = self.command()
        assert code == 0, output
        after = os.statvfs(self.disk)
        self.used = (before.f_bavail - after.f_bavail) * after.f_frsize
        self.whole = small_runs.contents(self.name, self.disk / "run")
        shutil.rmtree(self.disk / "run")

    def attempt(self, number: int) -> None:
        """Run the command with a disturbance, and then again without."""
        run = self.disk / "run"
        old = OLD.get(self.name, ()) if number % 2 else ()
        for path in [run / name for name in old]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(OLD_CONTENT)
        reason = KINDS[number % len(KINDS)]
        run.mkdir(exist_ok=True)
        if reason == FULL:
            self._fill(int(self.used * self.random.random() ** 2))
        elif reason == READ_ONLY:
            subprocess.run(["mount", "-o", "remount,ro", self.disk], check=True)
        code, output = self.command(jumping_clock if reason == CLOCK else lambda: None)
        if reason == READ_ONLY:
            subprocess.run(["mount", "-o", "remount,rw", self.disk], check=True)
        if code == 0:
            self.outcomes[CLOCK if reason == CLOCK else "fits"] += 1
            problems = [f"ended with 0: {problem}" for problem in self._differences()]
        else:
            self.outcomes[reason] += 1
            problems = self._judge_output(code, output, reason) + self._judge_files(old)
        (self.disk / "filler").unlink(missing_ok=True)
        code, output = self.command()
        refuses = small_runs.COMMANDS[self.name].refuses
        if code != 0 and not (refuses and refuses in output):
            problems.append(f"with enough space: exit code {code}: {output[-200:]}")
        problems += [f"with enough space: {problem}" for problem in self._differences()]
        if problems:
            shutil.copytree(run, self.out / f"{self.name} {number}", dirs_exist_ok=True)
            self.failures.append(f"attempt {number}: {'; '.join(problems)}")
        shutil.rmtree(run)

    def _differences(self) -> list[str]:
        """Return how the files differ from those of an undisturbed run, at most three of the differences."""
        return small_runs.differences(self.name, self.disk / "run", self.whole)[:3]

    def _fill(self, left: int) -> None:
        """Fill the disk but for some bytes."""
        free = os.statvfs(self.disk)
        with (self.disk / "filler").open("wb") as file:
            file.write(bytes(max(free.f_bavail * free.f_frsize - left, 0)))

    def _judge_output(self, code: int | None, output: str, reason: str) -> list[str]:
        """Return what is wrong with the exit code and the output of a command that failed."""
        problems = [] if code == 1 else [f"exit code {code}"]
        if output.count("Traceback") > output.count("Exception in thread"):  # TensorBoard's thread prints one
            problems.append("a traceback")
        lines = output.strip().splitlines()
        if not any(re.search(SENTENCE.format(reason=reason), line) for line in lines):
            problems.append(f"the output must name a file and the reason, got {lines[-3:]}")
        if sum(line.startswith("sgalign: ") for line in lines) > small_runs.COMMANDS[self.name].processes:
            problems.append(f"more than one sentence: {lines[-3:]}")
        return problems

    def _judge_files(self, old: tuple[str, ...]) -> list[str]:
        """Return what is wrong with the files of a command that failed."""
        problems = []
        try:
            left = small_runs.contents(self.name, self.disk / "run")
        except Exception as error:
            return [f"{type(error).__name__}: {error}"]
        for name in old:
            text = (self.disk / "run" / name).read_text()
            if text != OLD_CONTENT and left[name] != self.whole[name]:
                problems.append(f"{name} is neither the old nor the new file")
        problems += [f"{name} is left" for name in left if ".partial" in name]
        complete = self.name not in ("predict", "ablate") and not self.name.startswith(
            "fit"
        )  # these have earlier states
        if complete and (half := [n for n in left if n not in old and left[n] != self.whole.get(n)]):
            problems.append(f"{', '.join(half)} differ from an undisturbed run's")
        return problems


def jumping_clock() -> None:
    """Let `time.time` jump by days every few calls. Files keep the time of the system."""
    real, calls = time.time, itertools.count()

    def jumping() -> float:
        return real() + 86400 * DAYS[next(calls) // 5 % len(DAYS)]

    time.time = jumping
    if tqdm := sys.modules.get("tqdm.std"):
        tqdm.time = jumping  # type: ignore[attr-defined]


def main() -> None:
    """Run the campaign and print a table. End with status 1 if a command failed a check."""
    options = small_runs.options(__doc__, "attempts", 20, "build/disks")
    work = Path(tempfile.mkdtemp()).resolve()
    disk = work / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], capture_output=True, text=True
    )
    if mount.returncode:
        shutil.rmtree(work)
        sys.exit(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}. Run this as root, or with `unshare -rm`")
    try:
        failed = run_all(options, work, disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
        shutil.rmtree(work)
    sys.exit(int(failed))


def run_all(options: argparse.Namespace, work: Path, disk: Path) -> bool:
    """Run the attempts of the named commands, and return True if any check failed."""
    small_runs.load(options.commands)
    options.out.mkdir(parents=True, exist_ok=True)
    inputs, failed = small_runs.make_inputs(work, options.commands), False
    print("| command | output, KiB | attempts | seconds | failures |\n|---|---|---|---|---|", flush=True)
    for name in options.commands:
        begin = time.monotonic()
        attempts = Attempts(name, inputs, work, disk, options.out.resolve(), options.seed)
        attempts.measure()
        for number in range(options.count):
            attempts.attempt(number)
        counts = ", ".join(f"{count} {what}" for what, count in attempts.outcomes.items())
        failures = "; ".join(attempts.failures) or "none"
        print(
            f"| {name} | {attempts.used >> 10} | {counts} | {time.monotonic() - begin:.0f} | {failures} |", flush=True
        )
        failed |= bool(attempts.failures)
    return failed


if __name__ == "__main__":
    main()
