"""Samples of a process during a long run, and the verdict that its resources and its speed stay the same."""

from __future__ import annotations

import csv
import gc
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median

import torch

SAMPLES = 120  # per part
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Sample:
    """The state of the process after some steps of a part."""

    part: str
    step: int
    seconds: float  # since the start of the part
    memory: float  # resident MiB of this process
    workers_memory: float  # resident MiB of its child processes together, where shared pages count in each
    objects: int  # that the part has made and Python's garbage collector knows, after a collection
    tensors: int
    handles: int  # open files
    threads: int
    children: int  # child processes
    speed: float  # steps per CPU second of this process since the sample before


@dataclass(frozen=True)
class Limits:
    """The most by which a quantity's median may grow (speed: fall) from the middle to the last third of a part."""

    memory: float = 1.0  # MiB
    workers_memory: float = 4.0  # MiB
    objects: float = 100
    tensors: float = 0
    handles: float = 0
    threads: float = 0
    children: float = 0
    speed: float = 0.2  # share of the middle third's, because other programs use the caches of the same cores


class Monitor:
    """A counter of steps that samples the process at even distances, or after each step that takes longer than one.

    Args:
        part: the name of the part.
        steps: the number of steps, or None if the part ends after some time.
        seconds: the time after which the part ends, or None.
    """

    def __init__(self, part: str, *, steps: int | None = None, seconds: float | None = None) -> None:
        self.part, self.steps, self.seconds = part, steps, seconds
        self.step, self.samples, self._next = 0, list[Sample](), 1
        gc.collect()
        gc.freeze()  # samples count only the objects that the part makes, because counting all takes a second
        self._start, self._last_step, self._last_cpu = time.monotonic(), 0, time.process_time()

    @property
    def done(self) -> float:
        """The share of the part that is done."""
        if self.steps is not None:
            return self.step / self.steps
        assert self.seconds is not None
        return (time.monotonic() - self._start) / self.seconds

    @property
    def finished(self) -> bool:
        return self.done >= 1

    def count(self) -> None:
        """Count one step, and sample the process if it is time."""
        self.step += 1
        if (due := self.done * SAMPLES) >= self._next:
            self._next = int(due) + 1  # samples that a long step has missed are left out
            self.samples.append(self._sample())
            # The time of the sample does not belong to the steps.
            self._last_step, self._last_cpu = self.step, time.process_time()

    def _sample(self) -> Sample:
        cpu = time.process_time() - self._last_cpu
        children = child_processes()
        memory, workers_memory = resident(os.getpid()), sum(map(resident, children))
        gc.collect()
        kinds = [type(x) for x in gc.get_objects()]  # isinstance would call the code of lazy objects
        return Sample(
            part=self.part,
            step=self.step,
            seconds=time.monotonic() - self._start,
            memory=memory,
            workers_memory=workers_memory,
            objects=len(kinds),
            tensors=sum(issubclass(kind, torch.Tensor) for kind in kinds),
            handles=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            children=len(children),
            speed=(self.step - self._last_step) / cpu if cpu else 0.0,
        )


def resident(process: int) -> float:
    """Return the resident memory of a process in MiB, or 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE


def child_processes() -> list[int]:
    """Return the child processes of this process. They include those that have ended, if nobody has waited for them."""
    tasks = Path("/proc/self/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


@dataclass(frozen=True)
class Verdict:
    """The medians of one quantity in the middle and in the last third of a part."""

    part: str
    quantity: str
    middle: float
    last: float
    limit: float

    @property
    def flat(self) -> bool:
        """True if the quantity stays the same. Less memory or more speed is no fault."""
        if self.quantity == "speed":
            return self.last >= self.middle * (1 - self.limit)
        return self.last <= self.middle + self.limit


def verdicts(samples: list[Sample], limits: Limits) -> list[Verdict]:
    """Return the verdict of each quantity of a part. The first third does not count, because caches fill in it."""
    third = len(samples) // 3
    if not third:
        raise SystemExit(f"a part must have at least 3 samples, got {len(samples)}: run it for longer")
    middle, last = samples[third : 2 * third], samples[-third:]

    def of(quantity: str) -> tuple[float, float]:
        return median(getattr(x, quantity) for x in middle), median(getattr(x, quantity) for x in last)

    part = samples[0].part
    return [Verdict(part, limit.name, *of(limit.name), getattr(limits, limit.name)) for limit in fields(limits)]


def row_of(samples: list[Sample], results: Iterable[Verdict]) -> str:
    """Return a row of the table: the part, its size, and the medians of the middle and of the last third."""
    by_name = {result.quantity: result for result in results}

    def change(quantity: str, digits: int = 0) -> str:
        result = by_name[quantity]
        text = f"{result.middle:.{digits}f} → {result.last:.{digits}f}"
        return text if result.flat else f"**{text}**"

    size = f"{samples[-1].step} | {samples[-1].seconds:.0f}"
    cells = [change("memory", 1), change("workers_memory", 1), *map(change, ("objects", "tensors", "handles"))]
    cells += [change("threads"), change("children"), change("speed", 1)]
    return f"| {samples[0].part} | {size} | {' | '.join(cells)} |"


HEADER = """\
| part | steps | seconds | MiB | MiB of workers | objects | tensors | handles | threads | children | steps/CPU s |
|---|---|---|---|---|---|---|---|---|---|---|"""


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Write samples to a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Sample)])
        writer.writeheader()
        writer.writerows(map(asdict, samples))


def plot(path: Path, parts: list[list[Sample]]) -> None:
    """Draw the memory, handles, threads and speed of all parts over the share of the part that is done."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    titles = {"memory": "resident memory in MiB", "handles": "open files", "threads": "threads"}
    titles["speed"] = "steps per CPU second, as a share of the part's median"
    for axis, (quantity, title) in zip(axes.flat, titles.items()):
        for number, samples in enumerate(parts):
            scale = median(sample.speed for sample in samples) if quantity == "speed" else 1
            x = [100 * sample.step / samples[-1].step for sample in samples]
            y = [getattr(sample, quantity) / scale for sample in samples]
            axis.plot(x, y, label=samples[0].part, color=f"C{number % 10}", linestyle="-" if number < 10 else "--")
        axis.set(title=title, xlabel="steps in percent")
        axis.set_ylim(0, None)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
