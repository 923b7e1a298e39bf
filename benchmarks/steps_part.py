"""The part "steps" of the GPU report: whole training steps, and the measured and counted cost of the mirror."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import conftest, measuring
from benchmarks.measuring import Figures
from benchmarks.record import HARNESS, OURS, Record, digest, table_entries

WARM_UPS, ROUNDS = 2, 7
CODE = (*HARNESS, "benchmarks/steps_part.py", "sgalign/models/*.py", "sgalign/training/*.py", "sgalign/*.py")
CASES = {  # case -> the benchmark module that makes the step, and the kind of step
    "Motifs, cached features": ("test_training_step", "cached"),
    "SGTR, structural decoder": ("test_sgtr", "decoder"),
    "SGTR from images": ("test_sgtr", "images"),
    "Motifs, extractors trained": ("test_training_step", "extractors"),
}


def run(record: Record) -> None:
    """Time every step, forward and backward: without the mirrored branch, with it in one pass, and in two passes."""
    backends = [name for name in measuring.available() if name in OURS]
    ours = [pattern for name in backends for pattern in OURS[name]]
    for precision, (case, (benchmark, of)) in ((p, item) for p in ("bfloat16", "float32") for item in CASES.items()):
        entries = ""
        if benchmark == "test_sgtr":  # its attention has 32 channels
            bits = 16 if precision == "bfloat16" else 32
            entries = " ".join(table_entries(bits, [32], [1, 2], dropout, True) for dropout in (False, True))
        depends = digest(*CODE, f"benchmarks/{benchmark}.py", *ours, entries)
        record.attempt((f"{case}, {precision}",), measure, benchmark, of, precision, digest=depends)


def measure(benchmark: str, of: str, precision: str) -> Figures:
    """Return the time and the peak memory of every variant of a step."""
    contenders, parameters, counted = step(benchmark, of)
    if precision == "bfloat16":
        cast = torch.autocast(measuring.DEVICE.type, torch.bfloat16)
        contenders = {name: cast(step) for name, step in contenders.items()}
    conftest.time_steps(contenders, parameters, rounds=WARM_UPS, device=measuring.DEVICE)  # compiles and warms up
    times, peaks = conftest.time_steps(contenders, parameters, rounds=ROUNDS, device=measuring.DEVICE)
    taken = {name: {"call": 1e3 * statistics.median(times[name]), "peak": peaks[name]} for name in times}
    return {"contenders": taken, "counted": counted}


def step(benchmark: str, of: str) -> Any:
    """Return the variants of a step by name, all of their parameters, and the counted ratio."""
    if benchmark == "test_sgtr":
        from benchmarks import test_sgtr

        steps = test_sgtr.decoder_steps if of == "decoder" else test_sgtr.image_steps
        return steps(measuring.DEVICE)
    from benchmarks.test_training_step import Step

    step = Step(extractors=of == "extractors", device=measuring.DEVICE)
    return step.contenders(), step.parameters, step.counted()
