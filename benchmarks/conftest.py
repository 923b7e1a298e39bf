"""The closing tables: ratios within this run, since absolute times say little on a shared machine."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest
from torch import Tensor, nn

# Filled by the tests.
seconds: dict[str, dict[str, float]] = defaultdict(dict)  # group -> contender -> fastest round
flops: dict[str, int] = {}  # group -> of the matrix products of both branches
peak_memory: dict[str, float] = {}  # contender -> MiB
# case -> seconds and peak memory (MiB) of each contender, and the ratio that counting arithmetic gives
training_steps: dict[str, tuple[dict[str, float], dict[str, float], float]] = {}
sgemm_rate: list[float] = []  # flops per second
SPLIT_SHAPE = (8, 8, 180, 1024)  # B, H, Lq, Lk of the split into matrix products and the rest


def measure(benchmark, contender: str, run: Callable[[], None]) -> None:
    """Benchmarks `run` in as many rounds as fit a third of a second, and records its fastest for the tables."""
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
    parameters: Iterable[nn.Parameter],
    counted: float,
    *,
    rounds: int,
) -> None:
    """Forward and backward of all steps in turn, so that they meet the same machine; with their peak memory.

    The first is what the others are compared with, the second is the one with a mirror: `counted` is the ratio of its
    arithmetic, and the benchmark's own figure is its.
    """
    parameters = list(parameters)

    def run(contender: str) -> float:
        start = time.perf_counter()
        for parameter in parameters:
            parameter.grad = None
        steps[contender]().backward()
        return time.perf_counter() - start

    peaks = {}
    for contender in steps:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        run(contender)
        peaks[contender] = status_kib("VmHWM") / 1024
    times = [{name: run(name) for name in steps} for _ in range(rounds)]
    benchmark.group = f"training step, {case}"
    benchmark.pedantic(lambda: run(list(steps)[1]), rounds=1)
    if benchmark.enabled:
        training_steps[case] = {name: min(t[name] for t in times) for name in steps}, peaks, counted


def status_kib(field: str) -> int:
    """A figure of this process from the kernel, in KiB; Linux only."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not seconds and not training_steps:
        return
    write = terminalreporter.write_line
    terminalreporter.section("ratios of this run (times are the fastest round's, in ms)")
    write(f"{'':46}{'dual':>8}{'best alternative':>30}{'ratio':>8}{'/ single':>10}{'same query':>12}{'of sgemm':>10}")
    for group, entries in seconds.items():
        others = {name: time for name, time in entries.items() if not name.startswith("sgalign")}
        if "sgalign dual" not in entries or not others:
            continue
        dual, best = entries["sgalign dual"], min(others, key=lambda name: others[name])
        line = f"{group:46}{1e3 * dual:8.2f}{best:>22}{1e3 * others[best]:8.2f}{others[best] / dual:7.2f}x"
        if group in flops:
            line += f"{dual / entries['sgalign single']:9.2f}x"
            same_query = entries.get("sgalign same query")
            line += f"{same_query / entries['sgalign single, masked']:11.2f}x" if same_query else " " * 12
            line += f"{flops[group] / dual / sgemm_rate[0]:10.0%}" if sgemm_rate else ""
        write(line)
    write(
        "ratio: best alternative / dual.  / single: dual / one (unmasked) branch.  same query: dual with one query for"
    )
    write("both branches / one masked branch.  of sgemm: the matrix products' operations a second, as a share of what")
    write("torch's float32 matrix product of two 1024 x 1024 matrices reaches here.")
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
