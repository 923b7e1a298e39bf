"""How the GPU report times, checks and differentiates a contender, and what it notes where that fails."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.report_markdown import NOT_REACHED
from sgalign.ops import backends

DEVICE = torch.device("cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# ||out - ref|| / ||ref||: a few roundings of the dtype, and of float32 sums of products
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
Figures = dict[str, Any]


def graph_ms(calls: list[Callable[[], object]]) -> float:
    """Return the device time of one call, in a CUDA graph that goes through all of `calls` in turn."""
    from triton.testing import do_bench_cudagraph

    turns = itertools.cycle(calls)
    return do_bench_cudagraph(lambda: next(turns)(), return_mode="median")


def call_ms(call: Callable[[], object]) -> float:
    """Return the time of one call, the median of runs of ten calls in a row, as a training loop makes them.

    Not `triton.testing.do_bench`: it empties the cache before each call, and its events leave out most of launching.
    """
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.monotonic() + 0.15
    while len(times) < 3 or (time.monotonic() < deadline and len(times) < 100):
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / 10)
    return statistics.median(times)


def timed(calls: list[Callable[[], object]]) -> Figures:
    """Return all that is measured of a contender; `calls` differ in their inputs alone."""
    from benchmarks import conftest

    for call in calls:  # compiles, and draws what a call draws once
        call()
    before, peak = conftest.memory(calls[0], DEVICE)
    return {"graph": graph_ms(calls), "call": call_ms(calls[0]), "peak": peak - before}


def attempt(
    measure: Callable[..., Figures],
    *arguments: Any,
    deadline: float = float("inf"),
    before: Figures | None = None,
) -> Figures:
    """Return what `measure` gives, or a sentence about why it gives nothing.

    A result of an earlier run, `before`, is returned as it is, unless time was up before it was measured.
    """
    if before and before.get("failure") != NOT_REACHED:
        return before
    if time.monotonic() > deadline or not usable():
        return {"failure": NOT_REACHED}
    try:
        return measure(*arguments)
    except (Exception, pytest.skip.Exception) as error:  # benchmarks skip what is not installed
        return {"failure": sentence(error)}
    finally:
        gc.collect()
        if usable():
            torch.cuda.empty_cache()


def known_contenders(before: Figures, shape: Sequence[int], dtype: str, backward: bool) -> Figures:
    """Return the contenders that an earlier run, which was cut off, measured at this shape and dtype."""
    case = [*shape], dtype, backward
    rows = (row for row in before.get("rows", []) if ([*row["shape"]], row["dtype"], row["backward"]) == case)
    return next(rows, {"contenders": {}})["contenders"]


def usable() -> bool:
    """Return whether the device answers: after an illegal access this process never gets it back."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sentence(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def sets_beyond_cache(mebibytes: float) -> int:
    """Return how many sets of inputs no cache holds, at most 8."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size / 2**20
    return max(1, min(8, int(2 * cache / mebibytes) + 1))


def available() -> list[str]:
    """Return the names of the backends for GPUs that run here."""
    return [name for name in backends.ON_GPU if not backends.unavailable(name)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Let what is allocated without being filled start as NaN, so that an unwritten element shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with (
        mock.patch.object(torch, "empty_like", poison(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poison(Tensor.new_empty)),
    ):
        yield


def relative_error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Return the largest of ||got - expected|| / ||expected||; NaN where one is."""
    errors = [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def checked(got: Callable[[], list[Tensor]], expected: Callable[[], list[Tensor]], dtype: str) -> Figures:
    """Return the error of results that are computed in poisoned memory, against float64, and whether it is allowed."""
    with poisoned():
        found = got()
    error = relative_error(found, expected())
    return {"error": error, "allowed": TOLERANCE[dtype], "right": error <= TOLERANCE[dtype]}


def differentiated(contender: Callable[..., Iterable[Tensor]], tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that runs a contender and returns its outputs, then the gradients of tensors that require one.

    It uses `torch.autograd.grad`, because `backward` would add the gradients of all calls up in `.grad`.
    """
    grads: list[Tensor] = []
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(bool(wanted)):
            outs = list(contender(*tensors))
        if not wanted:
            return outs
        if not grads:
            grads.extend(torch.randn_like(out) for out in outs)
        return outs + gradients(outs, wanted, grads)

    return run


def gradients(outs: Sequence[Tensor], wanted: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of `wanted`, without those that a contender did not use."""
    found = torch.autograd.grad(outs, wanted, grads, allow_unused=True)
    return [grad for grad in found if grad is not None]
