"""The figures of one part of the GPU report. Known cases are kept, and the others are measured one by one."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks import measuring
from benchmarks.measuring import ROOT, Figures
from benchmarks.report_markdown import NOT_REACHED

RUNNING = "is being measured"
# Files that all figures depend on, and files that only the figures of our backends depend on.
HARNESS = ("benchmarks/measuring.py", "benchmarks/conftest.py")
OURS = {
    "cpu": ("sgalign/ops/*.py", "csrc/**/*"),
    "triton": ("sgalign/ops/*.py", "kernels/*.py"),
    "cuda": ("sgalign/ops/*.py", "csrc/**/*"),
}


class DeviceLost(Exception):
    """The error of a process that has lost its device. Another process can still use the device."""


class Record:
    """The figures of one part while they are measured: nested dictionaries with each case at its place (its keys).

    A part calls `attempt` for each of its cases, most important first. A record without a deadline measures nothing. It
    only shows which cases are known and which are left.

    Args:
        known: figures of an earlier record.
        figures: dictionary to fill. It may be `known` itself if both hold the same cases.
        deadline: time after which no measurement starts, on the clock of `time.monotonic`.
        send: function that is called with `figures` before each measurement. In `figures`, the case to be measured then
            has the failure `RUNNING`.
    """

    def __init__(
        self,
        known: Figures,
        figures: Figures,
        deadline: float = -math.inf,
        send: Callable[[Figures], None] = lambda figures: None,
    ) -> None:
        self.known, self.figures, self.deadline, self.send = known, figures, deadline, send

    def attempt(self, place: Sequence[str], measure: Callable[..., Figures], *arguments: Any, digest: str) -> None:
        """Measure a case and put its figures, or a sentence about its failure, at its place.

        Args:
            place: keys of the case, the outermost first.
            measure: function that returns the case's figures, called with `arguments`.
            digest: digest of everything that the figures depend on. Known figures with the same digest are not
                measured again.

        Raises:
            DeviceLost: if this process can measure nothing more. The case's figures are in place by then.
        """
        *path, name = place
        known, found = self.known, self.figures
        for key in path:
            known, found = known.get(key, {}), found.setdefault(key, {})
        before = known.get(name, {})
        if before.get("sources") == digest and before.get("failure") != NOT_REACHED:
            found[name] = before
        elif time.monotonic() > self.deadline:
            found[name] = {"failure": NOT_REACHED}
        else:
            found[name] = {"failure": RUNNING, "sources": digest}
            self.send(self.figures)
            found[name] = attempted(measure, *arguments) | {"sources": digest}
            if not measuring.usable():
                raise DeviceLost
            gc.collect()
            gc.freeze()  # otherwise, collecting garbage takes a tenth of a second for every case
            torch.cuda.empty_cache()

    def row(self, part: str, shape: Sequence[int], dtype: str, backward: bool, **work: Any) -> tuple[str, str, str]:
        """Describe a row of the part's table, and return the place of its contenders."""
        name = f"{', '.join(map(str, shape))}, {dtype}, {'forward and backward' if backward else 'forward'}"
        row = self.figures.setdefault(part, {}).setdefault(name, {})
        row.update(shape=[*shape], dtype=dtype, backward=backward, **work)
        return part, name, "contenders"


Part = Callable[[Record], None]


def attempted(measure: Callable[..., Figures], *arguments: Any) -> Figures:
    """Return the figures of `measure`, or its failure as a sentence."""
    try:
        return measure(*arguments)
    except (Exception, pytest.skip.Exception) as error:  # benchmarks skip if a package is not installed
        return {"failure": measuring.sentence(error)}


def planned(part: Part, known: Figures) -> Figures:
    """Return the known figures of a part, with its other cases marked as not reached."""
    record = Record(known, {})
    part(record)
    return record.figures


def settled(figures: Figures, said: str) -> Figures:
    """Return a copy of the figures, with `said` as the failure of the case that was being measured."""
    figures = copy.deepcopy(figures)

    def settle(tree: Any) -> None:
        if isinstance(tree, dict):
            if tree.get("failure") == RUNNING:
                tree["failure"] = said
            for value in tree.values():
                settle(value)

    settle(figures)
    return figures


@functools.cache
def digest(*of: str) -> str:
    """Return a digest of this card, of `versions`, of source files and of other strings.

    Args:
        of: patterns of files, relative to the root of the source tree, and other strings, which stand for themselves.
            A string with a slash is a pattern.
    """
    digest = hashlib.sha256(" ".join([torch.cuda.get_device_name(), *versions(), *of]).encode())
    for pattern in of:
        for path in sorted(ROOT.glob(pattern)) if "/" in pattern else ():
            if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> list[str]:
    """Return the versions and settings that figures depend on, besides the card and the code."""
    from triton import __version__ as triton

    from sgalign.kernels import configs

    asked = [f"float32 by {configs.ASKED_PRECISION}"] if configs.ASKED_PRECISION else []
    return [f"torch {torch.__version__}", f"triton {triton}", *asked]


def table_entries(bits: int, channels: Sequence[int], branches: Sequence[int], dropout: bool, backward: bool) -> str:
    """Return the entries of the Triton kernels' table for these kinds of attention, as a string."""
    from sgalign.kernels import configs

    kernels = ("forward", "query_gradient", "key_value_gradient") if backward else ("forward",)
    name = configs.architecture(measuring.DEVICE)
    found = {
        (kernel, dim, count): [*configs.lookup(kernel, name, bits, dim, count, dropout)]
        for kernel in kernels
        for dim in channels
        for count in branches
    }
    return str(found)
