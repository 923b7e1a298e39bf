"""Running the runs of a study on this machine, several at a time."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import sgalign
from sgalign.errors import InputError
from sgalign.studies import claims
from sgalign.studies.plan import Run
from sgalign.studies.progress import Progress, title
from sgalign.studies.results import RESULT

PAUSE = 1.0  # seconds between two looks at the running processes
LOG_SPACE = 1 << 16  # bytes that must be free for the last line of a log to be the error
PATIENCE = 20.0  # seconds that a process has to end after SIGTERM


def slots(runs: Sequence[Run], jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of each of the `jobs` processes that run at the same time.

    On a machine with GPUs, each process sees as many GPUs as its run trains on. On the CPU, the processes share the
    cores, unless OMP_NUM_THREADS is set.

    Raises:
        ValueError: if there are fewer GPUs than the processes need.
    """
    on_cpu = all(run.config["trainer"]["accelerator"] == "cpu" for run in runs)
    if torch.cuda.is_available() and not on_cpu:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]
        each = max((run.devices for run in runs), default=1)
        if each > len(devices):
            raise InputError(f"trainer.devices must be at most {len(devices)}, the number of GPUs, got {each}")
        if jobs * each > len(devices):
            raise InputError(
                f"--jobs must be at most {len(devices) // each}, because a run trains on {each} of the {len(devices)} "
                f"GPUs, got {jobs}"
            )
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[job * each : (job + 1) * each])} for job in range(jobs)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // jobs, 1)))}] * jobs


def environment(more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a process that imports this installation of the package, wherever it starts."""
    path = str(Path(sgalign.__file__).resolve().parent.parent)
    paths = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
    # In the variables of a SLURM job with one task, Lightning would see a run of one process.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SLURMD_"))}
    return inherited | more | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}


def run_here(runs: Sequence[Run], jobs: int) -> list[Run]:
    """Do runs on this machine and return those that failed. A failing run does not end the others.

    If another process holds a run, it is left to that process, and done here if that process gives up.

    Args:
        runs: the runs, in the order in which they start.
        jobs: number of runs at the same time.
    """
    if several := [run for run in runs if run.config["trainer"]["num_nodes"] > 1]:
        raise InputError(
            f"{title(several[0])}: trainer.num_nodes must be 1 here. Its folder is made, so start this on each node: "
            f"torchrun ... -m sgalign.studies.execute {several[0].folder}"
        )
    # Without these handlers, the runs would go on if a signal ends this process.
    handlers = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGHUP)}
    free = slots(runs, jobs)
    waiting, failed = list(runs), []
    going: dict[Path, tuple[Run, subprocess.Popen[bytes], dict[str, str]]] = {}
    named: set[Path] = set()
    with Progress(len(runs)) as progress:
        try:
            while waiting or going:
                for run in [run for run in waiting if (run.folder / RESULT).is_file()]:  # another process did it
                    waiting.remove(run)
                    progress.finished(run)
                for run in [run for run in waiting if free]:
                    if (other := claims.holder(run.folder)) is None:
                        waiting.remove(run)
                        slot = free.pop(0)
                        going[run.folder] = run, start(run.folder, slot), slot
                    elif run.folder not in named:
                        named.add(run.folder)
                        progress.say(f"{title(run)}: left to {other}")
                    if not free:
                        break
                progress.update({folder: run for folder, (run, _, _) in going.items()})
                # If a process could start, other processes hold all waiting runs. Looking at claims writes files.
                time.sleep(5 * PAUSE if free and waiting else PAUSE)
                for folder, (run, process, slot) in list(going.items()):
                    if (code := process.poll()) is None:
                        continue
                    del going[folder]
                    free.append(slot)
                    if code == claims.LOST:
                        waiting.append(run)
                    elif (folder / RESULT).is_file():
                        progress.finished(run)
                    else:
                        failed.append(run)
                        log = folder / "log.txt"
                        progress.finished(run, f"{reason(code, log)}, see {log}")
        finally:
            if going:
                progress.say("stopping the runs ...")
            stop([process for _, process, _ in going.values()])
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return failed


def _exit(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def start(folder: Path, slot: dict[str, str], *, own_session: bool = True) -> subprocess.Popen[bytes]:
    """Start the process of a run. Its output goes to `log.txt` in the run's folder.

    Args:
        folder: folder of the run.
        slot: environment variables of the process, as `slots` returns them.
        own_session: if True, Ctrl-C reaches only the command that started the process.
    """
    command = [sys.executable, "-m", "sgalign.studies.execute", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=environment(slot),
            start_new_session=own_session,
        )


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes with all their children. Their runs can go on later."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(end - time.monotonic(), 0))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def reason(code: int, log: Path) -> str:
    """Return why a process failed: the signal that ended it, a full disk, or the last line of its log."""
    if code == 0:
        return "it ended without a result"
    if -code in signal.valid_signals():
        return f"ended by {signal.Signals(-code).name}"
    with suppress(OSError):
        if shutil.disk_usage(log.parent).free < LOG_SPACE:  # the log may lack the error
            return str(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log.parent)))
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1].removeprefix("sgalign: ")
    return f"exit code {code}"
