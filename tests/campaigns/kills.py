"""Kill commands at random moments, run them again to the end, and compare the files with those of undisturbed runs.

A quarter of the kills comes at a random time, a quarter before a random operation on files, and a quarter when a file
reaches a random size. A kill by size ends the process that writes. Half of the kills by time and by operation end all
processes of a command, the rest only the main one or a worker. The last quarter is Ctrl-C at a random time, after which
the command must end by itself without a traceback. A command is killed up to three times before the run that goes to
the end. Its files must then equal those of an undisturbed run, no other file may be left, and all processes must have
ended.

    python tests/campaigns/kills.py --kills 50 --seed 1 predict evaluate
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_runs

KINDS = ("time", "operation", "size", "Ctrl-C")
VICTIMS = ("group", "group", "main", "worker")  # the group is the command with its workers, but without those of ablate
MOST = 3  # kills before a run that goes to the end
ORPHANS = 20.0  # seconds that worker processes may live after the end
OPERATIONS = {
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.utime", "os.chmod"),
    *("os.listdir", "os.scandir", "fcntl.flock"),
}
SUBREAPER = 36  # of prctl: orphaned processes become children of this one


class Operations:
    """A counter of the operations on files of a process and its children, which can kill at one of them."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return int(struct.unpack("q", self._memory[:8])[0])

    def arm(self, at: int, kill: Callable[[], None]) -> None:
        """Count from now on, and kill before the operation with number `at`, if this is not 0."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in OPERATIONS or (event == "open" and _writes(*arguments)):
                self._memory[:8] = struct.pack("q", self.count + 1)
                if self.count == at:
                    kill()

        self._memory[:8] = bytes(8)
        sys.addaudithook(hook)


def _writes(path: Any, mode: str | None, flags: int) -> bool:
    if not isinstance(path, str) or path.startswith(("/proc", "/sys", "/dev/null")):
        return False
    return flags & (os.O_WRONLY | os.O_RDWR) != 0


def kill_group() -> None:
    os.kill(0, signal.SIGKILL)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit_size(size: int) -> None:
    """Let the system kill the process as soon as one of its files is larger than a size."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


class Campaign:
    """The kills of one command.

    Args:
        name: name of the command.
        inputs: folder with the inputs of all commands.
        work: folder for the runs.
        out: folder for the files of failed runs.
        seed: seed of the kills.
    """

    def __init__(self, name: str, inputs: Path, work: Path, out: Path, seed: int) -> None:
        self.name, self.inputs, self.work, self.out = name, inputs, work, out
        self.random = random.Random(f"{seed} {name}")
        self.operations = Operations()
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.slowest = 0.0  # seconds of the slowest run that went to the end

    def measure(self) -> None:
        """Run the command undisturbed, and measure its time, its operations on files and the size of its files."""
        folder, begin = self.work / f"{self.name} undisturbed", time.monotonic()
        pid = small_runs.start(self.name, self.inputs, folder, lambda: self.operations.arm(0, kill_itself))
        code = small_runs.wait(pid)
        assert code == 0, (folder / small_runs.LOG).read_text()
        self.seconds, self.total = time.monotonic() - begin, self.operations.count
        self.size = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.whole = small_runs.contents(self.name, folder)

    def kill(self, kind: str, folder: Path) -> bool:
        """Start the command and kill it once. Return False if the command ended well before."""
        victim = self.random.choice(VICTIMS)
        at = self.random.randint(1, self.total)
        size = int(self.size ** self.random.random())
        moment = self.random.uniform(0, self.seconds) if kind in ("time", "Ctrl-C") else small_runs.LIMIT
        disturb = {
            "time": lambda: None,
            "operation": lambda: self.operations.arm(at, kill_group if victim == "group" else kill_itself),
            "size": lambda: limit_size(size),
            "Ctrl-C": lambda: None,
        }[kind]
        pid = small_runs.start(self.name, self.inputs, folder, disturb)
        end = time.monotonic() + moment
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status != 0
            time.sleep(0.002)
        if kind == "Ctrl-C":
            return self.interrupt(pid, folder)
        if kind != "time":
            self.failures.append(f"{kind} {at} {size}: did not end within {small_runs.LIMIT} s")
        workers = _children(pid) if victim == "worker" else []
        if workers:
            os.kill(self.random.choice(workers), signal.SIGKILL)
            return small_runs.wait(pid) != 0
        alone = victim == "main" or os.getpgid(pid) != pid  # a process that has just started has no group yet
        (os.kill if alone else os.killpg)(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return True

    def interrupt(self, pid: int, folder: Path) -> bool:
        """Interrupt the command as Ctrl-C in a terminal does. Return False if it ended well before."""
        log = folder / small_runs.LOG
        before = log.stat().st_size if log.exists() else 0
        while os.getpgid(pid) != pid:  # a process that has just started has no group yet
            time.sleep(0.002)
        os.killpg(pid, signal.SIGINT)
        code = small_runs.wait(pid)
        text = log.read_bytes()[before:].decode(errors="replace")  # a kill may have cut a character short
        ended_well = code in (0, 128 + signal.SIGINT, -signal.SIGINT) or self.refused(text)
        if code is None:
            self.failures.append(f"did not end within {small_runs.LIMIT} s after Ctrl-C")
        elif "Traceback" in text or not ended_well:
            shutil.copy(log, kept := self.out / f"{folder.name} Ctrl-C.txt")
            self.failures.append(f"ended with {code} or a traceback after Ctrl-C, see {kept.name}")
        return code != 0

    def refused(self, log: str) -> bool:
        """Return True if the command has refused to replace the output of an earlier run."""
        refuses = small_runs.COMMANDS[self.name].refuses
        return refuses is not None and refuses in log

    def run(self, kills: int) -> None:
        """Kill the command this often, and check the files after each run that goes to the end."""
        done = runs = 0
        while done < kills:
            folder = self.work / f"{self.name} {runs}"
            runs += 1
            history = []
            for _ in range(min(self.random.randint(1, MOST), kills - done)):
                kind = KINDS[done % len(KINDS)]
                if self.kill(kind, folder):
                    history.append(kind)
                    self.outcomes[kind] += 1
                    done += 1
                if small_runs.COMMANDS[self.name].processes > 1 and (waiting := _orphans()):
                    self.outcomes["left waiting for the killed process"] += waiting  # torchrun would end them at once
            problems = self.finish(folder)
            if problems:
                shutil.copytree(folder, self.out / folder.name, dirs_exist_ok=True)
                shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
                self.failures.append(f"after {', '.join(history) or 'no kill'}: {shown}, see {folder.name}")
            shutil.rmtree(folder)

    def finish(self, folder: Path) -> list[str]:
        """Run the command to the end and return what is wrong then."""
        begin = time.monotonic()
        code = small_runs.wait(small_runs.start(self.name, self.inputs, folder))
        self.slowest = max(self.slowest, time.monotonic() - begin)
        refused = self.refused((folder / small_runs.LOG).read_text(errors="replace"))
        problems = [] if code == 0 or refused else [f"exit code {code}"]
        if orphans := _orphans():
            problems.append(f"{orphans} processes still live {ORPHANS:.0f} s after the end")
        return problems + small_runs.differences(self.name, folder, self.whole)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _orphans() -> int:
    """Wait for all descendants of this process, and return how many had to be killed."""
    end, killed = time.monotonic() + ORPHANS, 0
    while True:
        try:
            done, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return killed
        if not done and time.monotonic() > end:
            for pid in _children(os.getpid()):
                os.kill(pid, signal.SIGKILL)
                killed += 1
            os.waitpid(-1, 0)
        time.sleep(0 if done else 0.01)


def run_all(options: argparse.Namespace, work: Path) -> bool:
    """Run the campaigns of the named commands in a folder, and return True if any check failed."""
    inputs, failed = small_runs.make_inputs(work, options.commands), False
    print("| command | undisturbed, s | operations | kills | slowest end, s | seconds | failures |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in options.commands:
        begin, campaign = time.monotonic(), Campaign(name, inputs, work, options.out.resolve(), options.seed)
        campaign.measure()
        campaign.run(options.count)
        counts = ", ".join(f"{count} {what}" for what, count in campaign.outcomes.items())
        failures = "; ".join(campaign.failures) or "none"
        print(
            f"| {name} | {campaign.seconds:.1f} | {campaign.total} | {counts} | {campaign.slowest:.1f} | "
            f"{time.monotonic() - begin:.0f} | {failures} |",
            flush=True,
        )
        failed |= bool(campaign.failures)
    return failed


def main() -> None:
    """Run the campaign and print a table. End with status 1 if a command failed a check."""
    options = small_runs.options(__doc__, "kills", 50, "build/kills")
    ctypes.CDLL(None).prctl(SUBREAPER, 1)
    small_runs.load(options.commands)
    options.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp()).resolve()  # TemporaryDirectory would delete it at the end of each fork
    try:
        failed = run_all(options, work)
    finally:
        shutil.rmtree(work)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
