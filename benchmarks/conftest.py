"""Functions that time the contenders, and the tables at the end of a benchmark run.

The tables show ratios within the run, because absolute times say little on a shared machine. SGALIGN_TEST_DEVICE=cuda
runs everything on a GPU. Each time then includes waiting for the device.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import time
import timeit
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("SGALIGN_TEST_DEVICE", "cpu"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError(f"SGALIGN_TEST_DEVICE={DEVICE} needs a GPU, but torch finds none")
# The tests fill these.
seconds: dict[str, dict[str, float]] = defaultdict(dict)  # group -> contender -> seconds of the fastest round
flops: dict[str, int] = {}  # group -> operations in the matrix products of both branches
peak_memory: dict[str, float] = {}  # contender -> MiB
# case -> seconds of each contender, peak memory (MiB) of each contender, and the ratio of their operations
training_steps: dict[str, tuple[dict[str, float], dict[str, float], float]] = {}
calls: dict[str, dict[str, float]] = {}  # case -> contender -> seconds per call in the fastest round
sgemm_rate: list[float] = []  # flops per second
SPLIT_SHAPE = (8, 8, 180, 1024)  # B, H, Lq, Lk at which the time is split into matrix products and the rest


def measure(benchmark, contender: str, run: Callable[[], None]) -> None:
    """Benchmark `run` for about 0.3 s, in 4 to 40 rounds, and record its fastest round for the tables."""
    run = waited_for(run)
    run()
    start = time.perf_counter()
    run()
    rounds = min(max(int(0.3 / (time.perf_counter() - start)), 4), 40)
    benchmark.pedantic(run, rounds=rounds)
    if benchmark.enabled:
        seconds[benchmark.group][contender] = benchmark.stats.stats.min


def compare_steps(
    benchmark,
    case: str,
    steps: dict[str, Callable[[], Tensor]],
    parameters: list[nn.Parameter],
    counted: float,
    *,
    rounds: int,
) -> None:
    """Record the time and peak memory of forward and backward for all steps, which run in turn.

    Running in turn exposes all steps to the same state of the machine. The first step is the baseline. The second has
    the mirrored branch. `counted` is the number of operations of the second divided by that of the first.
    pytest-benchmark shows the second step's time.
    """
    times, peaks = time_steps(steps, parameters, rounds=rounds)
    benchmark.group = f"training step, {case}"
    benchmark.pedantic(lambda: run_step(steps[list(steps)[1]], parameters), rounds=1)
    if benchmark.enabled:
        training_steps[case] = {name: min(taken) for name, taken in times.items()}, peaks, counted


def compare_calls(benchmark, case: str, contenders: dict[str, Callable[[], object]]) -> None:
    """Time calls that take microseconds, all contenders in turn and many calls per round.

    The first contender is the baseline. pytest-benchmark shows the second contender's time.
    """
    rounds, number = 60, 50
    if benchmark.enabled:
        times = [{name: timeit.timeit(call, number=number) for name, call in contenders.items()} for _ in range(rounds)]
        calls[case] = {name: min(taken[name] for taken in times) / number for name in contenders}
    benchmark.group = f"a call, {case}"
    benchmark.pedantic(contenders[list(contenders)[1]], rounds=rounds, iterations=number)


def time_steps(
    steps: dict[str, Callable[[], Tensor]],
    parameters: list[nn.Parameter],
    *,
    rounds: int,
    device: torch.device = DEVICE,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return each step's seconds in every round, with the steps in turn, and each step's peak memory in MiB."""

    def run(contender: str) -> float:
        start = time.perf_counter()
        waited_for(lambda: run_step(steps[contender], parameters), device)()
        return time.perf_counter() - start

    peaks = {name: memory(lambda name=name: run(name), device)[1] for name in steps}  # type: ignore[misc]
    times = [{name: run(name) for name in steps} for _ in range(rounds)]
    return {name: [taken[name] for taken in times] for name in steps}, peaks


def run_step(step: Callable[[], Tensor], parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
    step().backward()


def waited_for(run: Callable[[], object], device: torch.device = DEVICE) -> Callable[[], None]:
    """Return a function that calls `run` and then waits for the device."""

    def run_and_wait() -> None:
        run()
        if device.type != "cpu":
            torch.cuda.synchronize(device)

    return run_and_wait


def memory(run: Callable[[], object], device: torch.device = DEVICE) -> tuple[float, float]:
    """Return the memory before a run and at its peak, in MiB.

    On the CPU this is the resident set (Linux only). On a GPU it is the memory that torch's allocator has handed out.
    """
    gc.collect()
    if device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        waited_for(run, device)()
        return before / 2**20, torch.cuda.max_memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    resident = status_kib("VmRSS")
    run()
    return resident / 1024, status_kib("VmHWM") / 1024


def status_kib(field: str) -> int:
    """Return a field of /proc/self/status in KiB (Linux only)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def write_calls(terminalreporter: pytest.TerminalReporter) -> None:
    if not calls:
        return
    terminalreporter.section("one call on tensors of a few elements: time in us, and as a multiple of PyTorch's time")
    for case, taken in calls.items():
        base = next(iter(taken.values()))
        figures = (f"{name} {1e6 * time:.0f} ({time / base:.2f}x)" for name, time in taken.items())
        terminalreporter.write_line(f"{case:34}{'   '.join(figures)}")


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write_calls(terminalreporter)
    if not seconds and not training_steps:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios within this run (times in ms, fastest round)")
    write(f"{'':46}{'dual':>8}{'best alternative':>30}{'ratio':>8}{'/ single':>10}{'same query':>12}{'of sgemm':>10}")
    for group, entries in seconds.items():
        others = {name: time for name, time in entries.items() if not name.startswith("sgalign")}
        ours = {name: time for name, time in entries.items() if name not in others}
        if not ours or not others:
            continue
        dual, best = ours.get("sgalign dual", min(ours.values())), min(others, key=lambda name: others[name])
        line = f"{group:46}{1e3 * dual:8.2f}{best:>22}{1e3 * others[best]:8.2f}{others[best] / dual:7.2f}x"
        if group in flops:
            line += f"{dual / entries['sgalign single']:9.2f}x"
            same_query = entries.get("sgalign same query")
            line += f"{same_query / entries['sgalign single, masked']:11.2f}x" if same_query else " " * 12
            line += f"{flops[group] / dual / sgemm_rate[0]:10.0%}" if sgemm_rate else ""
        write(line)
    write(
        '"ratio" is the time of the best alternative, divided by the time of dual.\n'
        '"/ single" is the time of dual, divided by the time of one unmasked branch.'
    )
    write('"same query" is the time of dual with one query for both branches, divided by that of one masked branch.')
    write(
        '"of sgemm" is the rate of operations in the matrix products, as a share of the rate of torch in a float32\n'
        "product of two 1024 x 1024 matrices here."
    )
    narrow, wide = seconds.get("one branch, D 32"), seconds.get("one branch, D 128")
    if narrow and wide and sgemm_rate:
        terminalreporter.section(f"one branch forward at {SPLIT_SHAPE}: matrix products and the rest")
        for contender, time in narrow.items():
            channel = (wide[contender] - time) / (128 - 32)
            rate = 4 * math.prod(SPLIT_SHAPE) / channel
            line = f"{contender:24}products at D 32 {1e3 * 32 * channel:6.2f} ms, {rate / sgemm_rate[0]:.0%} of sgemm's"
            write(f"{line} rate; the rest {1e3 * (time - 32 * channel):6.2f} ms")
    if peak_memory:
        terminalreporter.section("peak memory of forward + backward beyond the inputs, MiB")
        for contender, mebibytes in peak_memory.items():
            write(f"{contender:30}{mebibytes:10.1f}")
    for case, (taken, peaks, counted) in training_steps.items():
        terminalreporter.section(f"forward and backward at the published sizes: {case}")
        base, mirrored = list(taken)[:2]
        for contender, time_taken in taken.items():
            ratio, memory = time_taken / taken[base], peaks[contender] / peaks[base]
            line = f"{contender:16}{time_taken:8.2f} s{ratio:7.2f}x {base}{peaks[contender]:10.0f} MiB{memory:7.2f}x"
            write(line + (f"   counted: {counted:.2f}x" if contender == mirrored else ""))
