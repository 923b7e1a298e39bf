"""How the GPU report times, checks and differentiates a contender, and what it notes where that fails."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sgalign.ops import backends

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# ||out - ref|| / ||ref||: a few roundings of the dtype, and of float32 sums of products
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
CALL_SECONDS = 0.15  # of plain calls, at least three runs
Figures = dict[str, Any]


def graph_ms(calls: list[Callable[[], object]]) -> float:
    """Return the device time of one call, in a CUDA graph that goes through all of `calls` in turn.

    Triton 3.6 to 3.8 call six times in a stream of their own, then as often as 20 ms allow while a graph is captured,
    and take the median of ten replays. They neither empty the cache nor wait for what other streams have begun.
    """
    from triton.testing import do_bench_cudagraph

    turns = itertools.cycle(calls)
    torch.cuda.synchronize()  # inputs may still be written
    return do_bench_cudagraph(lambda: next(turns)(), return_mode="median")


def call_ms(call: Callable[[], object]) -> float:
    """Return the time of one call, the median of runs of ten calls in a row, as a training loop makes them.

    Not `triton.testing.do_bench`: it empties the cache before each call, and its events leave out most of launching.
    """
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.monotonic() + CALL_SECONDS
    while len(times) < 3 or (time.monotonic() < deadline and len(times) < 100):
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / 10)
    return statistics.median(times)


def timed(calls: list[Callable[[], object]]) -> Figures:
    """Return all that is measured of a contender; `calls` differ in their inputs alone.

    What cannot be captured in a graph has the other figures beside its failure.
    """
    from benchmarks import conftest

    for call in calls:  # compiles, and draws what a call draws once
        call()
    before, peak = conftest.memory(calls[0], DEVICE)
    found: Figures = {"call": call_ms(calls[0]), "peak": peak - before}
    try:
        return found | {"graph": graph_ms(calls)}
    except Exception as error:
        return found | {"failure": f"no graph: {sentence(error)}"}


def usable() -> bool:
    """Return whether the device answers and draws random numbers.

    A process never gets it back after an illegal access, nor the numbers after some graphs that cannot be captured.
    """
    try:
        torch.rand(1, device=DEVICE)
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


def results() -> Path:
    """Return the folder of what is measured on this card."""
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / card


def check_environment() -> None:
    """Raise ValueError where an environment variable would make every float32 case fail."""
    if not backends.unavailable("triton"):
        from sgalign.kernels import configs

        configs.dot_precision()


def kept(file: Path) -> str:
    """Return what an interrupted command leaves in its file, as the end of a sentence."""
    return (
        f"{file} has what was measured until then; the same command goes on"
        if file.exists()
        else "nothing had been measured"
    )


def end_with_parent() -> None:
    """Interrupt this process when the one that started it has ended: one that was killed cannot do so itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)  # so that it stops its own processes
        time.sleep(5)  # which takes less
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


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
    errors = [float((g.detach().double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]
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
