"""Progress bars over the runs of a study and within each run that is going on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from typing_extensions import Self

from sgalign.studies.plan import Run
from sgalign.studies.recording import PROGRESS
from sgalign.studies.results import read_result

WAITING = "starting"


class Progress:
    """A bar over all runs, and a line for each run that is going on. Without a terminal, only finished runs are shown.

    Args:
        total: number of runs to do.
    """

    def __init__(self, total: int) -> None:
        self._all = tqdm(total=total, desc="runs", unit="run", dynamic_ncols=True, disable=None)
        self._lines: dict[Path, tqdm[Any]] = {}
        self.total, self.done = total, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for line in (*self._lines.values(), self._all):
            line.close()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        tqdm.write(text)

    def update(self, going: Mapping[Path, Run]) -> None:
        """Show the runs that are going on, by their folders."""
        for folder in self._lines.keys() - going.keys():
            self._lines.pop(folder).close()
        for folder, run in going.items():
            if folder not in self._lines:
                self._lines[folder] = tqdm(
                    desc=title(run), leave=False, dynamic_ncols=True, disable=None, bar_format="  {desc}"
                )
            self._lines[folder].set_description_str(f"{title(run)}: {state(folder)}")
        self._all.refresh()

    def finished(self, run: Run, error: str | None = None) -> None:
        """Count a run, and print its result or the reason why it failed."""
        self.done += 1
        self._all.update()
        result = None if error else read_result(run.folder)
        if result is None:
            self.say(f"{self.done}/{self.total} {title(run)}: FAILED: {error}")
            return
        shown = [name for name in ("R@50", "mR@50", "found") if name in result["test"]][:2]
        figures = ", ".join(f"{name} {100 * result['test'][name]:.1f}" for name in shown)
        seconds = result["cost"]["training"] + result["cost"]["test"]
        self.say(f"{self.done}/{self.total} {title(run)}: test {figures}, {seconds:.0f} s, {run.folder.name}")


def title(run: Run) -> str:
    """Return the names of study and arm, and the seed."""
    return f"{run.study} {run.arm}, seed {run.seed}"


def state(folder: Path) -> str:
    """Return how far a run is, such as "training, step 200 of 5000, epoch 2"."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        progress = json.loads((folder / PROGRESS).read_text())
        of = "" if progress["of"] is None else f" of {progress['of']}"
        unit = "step" if progress["part"] == "training" else "batch"
        return f"{progress['part']}, {unit} {progress['done']}{of}, epoch {progress['epoch']}"
    return WAITING
