"""Claims of runs, with which processes on several machines share a folder without doing a run twice.

A claim is a file `claim.N` in the run's folder. Its holder updates its time stamp. A claim of another machine has
expired if its time stamp is old. A claim of this machine has expired if its process has ended. Without /proc, which
tells this, the time stamp decides. Another process takes over by making `claim.N+1`, which only one process can do.
This needs no locks of the file system, which many clusters lack.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

EXPIRY = 300.0  # seconds without an update after which a claim has expired; longer than the caches of NFS
BEAT = 20.0  # seconds between two updates
LOST = 75  # exit code of a process that has lost its claim, or found the run claimed


class Claim:
    """A claim of a run by this process. A thread keeps it alive until `release`.

    If another process takes over nevertheless, because this one was suspended for longer than `EXPIRY`, this process
    ends with exit code `LOST`. Two processes then write to one run for at most `BEAT` seconds.

    Args:
        path: file of the claim, which this process has made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        updated = time.monotonic()
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # the next beat tries again
                if _latest(self.path.parent) != self.path or _content(self.path) != _self():
                    os._exit(LOST)
                os.utime(self.path)
                updated = time.monotonic()
            if time.monotonic() - updated > EXPIRY:  # others may have taken over
                os._exit(LOST)

    def release(self) -> None:
        """End the claim, so another process can take the run at once."""
        self._ended.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)


def take(folder: Path) -> Claim | None:
    """Return this process's claim of the run in a folder, or None if another process holds one."""
    held = _latest(folder)
    if held is not None and not expired(held):
        return None
    path = folder / f"claim.{_number(held) + 1}"
    try:
        with path.open("x") as file:
            json.dump(_self(), file)
    except FileExistsError:  # another process was faster
        return None
    except OSError:  # a full disk, on which an empty claim would block the run
        path.unlink(missing_ok=True)
        raise
    if _latest(folder) != path:  # others have taken and released claims since this process looked
        path.unlink(missing_ok=True)
        return None
    for earlier in folder.glob("claim.*"):
        if 0 < _number(earlier) < _number(path):
            earlier.unlink(missing_ok=True)
    return Claim(path)


def follow(folder: Path) -> bool:
    """Wait until the first process of this run's processes holds the claim, and return True.

    Return False if another run of the same folder holds it, or if nobody claims the run within `EXPIRY`.
    """
    end = time.monotonic() + EXPIRY
    while time.monotonic() < end:
        held = _latest(folder)
        if held is not None and not expired(held):
            return _content(held)["job"] == _job()
        time.sleep(1)
    return False


def holder(folder: Path) -> str | None:
    """Return the machine and process that hold the run in a folder, as text, or None if nobody does."""
    held = _latest(folder)
    if held is None or expired(held):
        return None
    return "process {pid} on {host}".format(**_content(held))


def expired(path: Path) -> bool:
    """Return True if a claim is no longer valid."""
    content = _content(path)
    if content["machine"] == _machine() and (started := _started(content["pid"])) != "unknown":
        return content["started"] != started  # whatever the time stamp says, because the clock may have been set
    try:
        return abs(_now(path.parent) - path.stat().st_mtime) > EXPIRY  # in the future if the clock was set back
    except FileNotFoundError:  # released meanwhile
        return True


def _latest(folder: Path) -> Path | None:
    return max(folder.glob("claim.*"), key=_number, default=None)


def _number(path: Path | None) -> int:
    text = "" if path is None else path.suffix[1:]
    return int(text) if text.isdecimal() else 0


def _content(path: Path) -> dict[str, str]:
    """Return the machine and the process that made a claim. A claim that is still being written names nobody."""
    nobody = {"host": "an unknown machine", "machine": "", "pid": "unknown", "started": "", "job": "unknown"}
    with suppress(OSError, RecursionError, ValueError, TypeError):
        return nobody | json.loads(path.read_text())
    return nobody


def _self() -> dict[str, str]:
    pid = str(os.getpid())
    return {"host": platform.node(), "machine": _machine(), "pid": pid, "started": _started(pid), "job": _job()}


def _job() -> str:
    """Return the name of the job under SLURM or torchrun, which all processes of a run share."""
    return os.environ.get("TORCHELASTIC_RUN_ID") or os.environ.get("SLURM_JOB_ID", "")


def _machine() -> str:
    """Return a name of this boot of this machine and of its container, in which process numbers are unique."""
    parts = [platform.node()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _started(pid: str) -> str:
    """Return the start time of a process of this machine, or "ended". It tells a reused process number."""
    if not Path("/proc/self").exists():  # not Linux: a claim then expires only by its age
        return "unknown"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (IndexError, OSError, ValueError):  # the first and the last if a damaged claim has no number of a process
        return "ended"


def _now(folder: Path) -> float:
    """Return the time of the file system, which several machines share, unlike their clocks."""
    with tempfile.TemporaryFile(dir=folder) as file:  # without a name, so a kill leaves nothing
        return os.fstat(file.fileno()).st_mtime
