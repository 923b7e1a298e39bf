"""The figures of a part of the GPU report: what is known is taken over, what is not is measured, case by case."""

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
# What all figures of a part depend on, and those of ours beside it.
HARNESS = ("benchmarks/measuring.py", "benchmarks/conftest.py")
OURS = {
    "cpu": ("sgalign/ops/*.py", "csrc/**/*"),
    "triton": ("sgalign/ops/*.py", "kernels/*.py"),
    "cuda": ("sgalign/ops/*.py", "csrc/**/*"),
}


class DeviceLost(Exception):
    """This process has no device any more; another one has."""


class Record:
    """A part's figures while they come about: nested dictionaries with a case's at its place.

    A part calls `attempt` for each of its cases, in the order of their worth. A record without a deadline measures
    none of them: it says what is known and what is left.

    Args:
        known: figures of an earlier record.
        figures: to be filled; `known` itself where these are of the same cases.
        deadline: of `time.monotonic`.
        send: is called with `figures` before each measurement. The one that runs then fails with `RUNNING`.
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
        """Put what `measure` gives at its place, or a sentence about why it gives nothing.

        Args:
            place: keys, the outermost first.
            digest: of all that the figures depend on. What is known with the same one is not measured again.

        Raises:
            DeviceLost: the figures are there, but nothing more can be measured in this process.
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
            gc.freeze()  # or collecting takes a tenth of a second each time, and does so for every case
            torch.cuda.empty_cache()

    def row(self, part: str, shape: Sequence[int], dtype: str, backward: bool, **work: Any) -> tuple[str, str, str]:
        """Describe a row of the part's table; return the place of its contenders."""
        name = f"{', '.join(map(str, shape))}, {dtype}, {'forward and backward' if backward else 'forward'}"
        row = self.figures.setdefault(part, {}).setdefault(name, {})
        row.update(shape=[*shape], dtype=dtype, backward=backward, **work)
        return part, name, "contenders"


Part = Callable[[Record], None]


def attempted(measure: Callable[..., Figures], *arguments: Any) -> Figures:
    """Return what `measure` gives, or its failure in a sentence."""
    try:
        return measure(*arguments)
    except (Exception, pytest.skip.Exception) as error:  # benchmarks skip what is not installed
        return {"failure": measuring.sentence(error)}


def planned(part: Part, known: Figures) -> Figures:
    """Return a part's figures as far as they are known, and what is left of them as not reached."""
    record = Record(known, {})
    part(record)
    return record.figures


def settled(figures: Figures, said: str) -> Figures:
    """Return figures in which the case that was being measured has failed so."""
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
    """Return a digest of this card and of `versions`, of files, and of what is no file.

    Args:
        of: patterns of files, from the root of the source tree; other strings stand for themselves.
    """
    digest = hashlib.sha256(" ".join([torch.cuda.get_device_name(), *versions(), *of]).encode())
    for pattern in of:
        for path in sorted(ROOT.glob(pattern)) if "/" in pattern else ():
            if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> list[str]:
    """Return what figures depend on beside the card and the code."""
    from triton import __version__ as triton

    from sgalign.kernels import configs

    asked = [f"float32 by {configs.ASKED_PRECISION}"] if configs.ASKED_PRECISION else []
    return [f"torch {torch.__version__}", f"triton {triton}", *asked]


def table_entries(bits: int, channels: Sequence[int], branches: Sequence[int], dropout: bool, backward: bool) -> str:
    """Return what the table of Triton's kernels has for attention of these kinds."""
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
