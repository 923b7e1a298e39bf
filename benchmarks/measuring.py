"""Functions that time, check and differentiate the contenders of the GPU report, and that describe failures."""

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
# largest allowed ||out - ref|| / ||ref||; allows for a few rounding errors of the dtype and of float32 sums of products
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
CALL_SECONDS = 0.15  # seconds for timing plain calls, unless three runs take longer
Figures = dict[str, Any]


def graph_ms(calls: list[Callable[[], object]]) -> float:
    """Return the device time of one call in ms, in a CUDA graph that goes through all of `calls` in turn.

    In Triton 3.6 to 3.8, `do_bench_cudagraph` first makes six calls in a separate stream. Then it captures a graph of
    the number of calls that fill 20 ms, and returns the median of ten replays. It neither empties the cache nor waits
    for the work of other streams.
    """
    from triton.testing import do_bench_cudagraph

    turns = itertools.cycle(calls)
    torch.cuda.synchronize()  # the device may still be writing the inputs
    return do_bench_cudagraph(lambda: next(turns)(), return_mode="median")


def call_ms(call: Callable[[], object]) -> float:
    """Return the time of one plain call in ms, as the median over runs of ten calls in a row.

    A training loop makes calls in a row, too. `triton.testing.do_bench` would not do, because it empties the cache
    before each call and its events leave out most of the launch.
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
    """Return all figures of a contender. `calls` differ only in their inputs.

    If the calls cannot be captured in a graph, the figures include that failure instead of a graph time.
    """
    from benchmarks import conftest

    for call in calls:  # compiles, and draws the values that are drawn only once
        call()
    before, peak = conftest.memory(calls[0], DEVICE)
    found: Figures = {"call": call_ms(calls[0]), "peak": peak - before}
    try:
        return found | {"graph": graph_ms(calls)}
    except Exception as error:
        return found | {"failure": f"no graph: {sentence(error)}"}


def usable() -> bool:
    """Return whether the device answers and draws random numbers.

    After an illegal access, a process never gets its device back. After a failed capture of some graphs, it can never
    draw random numbers again.
    """
    try:
        torch.rand(1, device=DEVICE)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def sentence(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


def sets_beyond_cache(mebibytes: float) -> int:
    """Return how many sets of inputs of this size exceed the cache, at most 8."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size / 2**20
    return max(1, min(8, int(2 * cache / mebibytes) + 1))


def results() -> Path:
    """Return the folder for the results of this card."""
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "benchmarks" / "results" / card


def check_environment() -> None:
    """Raise ValueError if an environment variable would make every float32 case fail."""
    if not backends.unavailable("triton"):
        from sgalign.kernels import configs

        configs.dot_precision()


def kept(file: Path) -> str:
    """Return the end of a sentence that says what an interrupted command has left in its file."""
    return (
        f"{file} has everything measured until then; run the same command to resume"
        if file.exists()
        else "nothing had been measured yet"
    )


def end_with_parent() -> None:
    """Interrupt this process when its parent ends, because a killed parent cannot stop this process itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGINT)  # lets it stop the processes that it has started
        time.sleep(5)  # time enough to stop them
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def available() -> list[str]:
    """Return the names of the GPU backends that run here."""
    return [name for name in backends.ON_GPU if not backends.unavailable(name)]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialized allocations with NaN, which exposes elements that a kernel does not write."""

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
    """Return the largest ||got - expected|| / ||expected||, or NaN if any of them is NaN."""
    errors = [float((g.detach().double() - e).norm() / e.norm()) for g, e in zip(got, expected, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def checked(got: Callable[[], list[Tensor]], expected: Callable[[], list[Tensor]], dtype: str) -> Figures:
    """Compute results in poisoned memory and return their error against float64, the limit, and whether it is met."""
    with poisoned():
        found = got()
    error = relative_error(found, expected())
    return {"error": error, "allowed": TOLERANCE[dtype], "right": error <= TOLERANCE[dtype]}


def differentiated(contender: Callable[..., Iterable[Tensor]], tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Return a function that runs a contender and returns its outputs, then the gradients of its inputs.

    Only the tensors that require a gradient get one. The function uses `torch.autograd.grad`, because `backward` would
    add up the gradients of all calls in `.grad`.
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
    """Return the gradients of `wanted`, except for tensors that a contender did not use."""
    found = torch.autograd.grad(outs, wanted, grads, allow_unused=True)
    return [grad for grad in found if grad is not None]
