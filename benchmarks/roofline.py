"""Predict the time of attention on a GPU from its compiled kernels: `python -m benchmarks.roofline` prints the table.

The compiled kernels (tests/compiled_kernels.csv) give the instructions per step, the registers and the shared memory.
The number of steps is computed from the shape. The rates come from the card's data sheet. Together these numbers give
four lower bounds. The prediction also accounts for the number of programs that a multiprocessor holds, the rate at
which one warp issues instructions, the waits in a step, and the part of the card that is idle during the last programs.
docs/performance.md compares it with an H200.
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent.parent / "tests" / "compiled_kernels.csv"
KERNELS = ("forward", "query_gradient", "key_value_gradient")
SHAPES = [
    (8, 8, 180, 100, 32),
    (8, 8, 180, 608, 32),
    (8, 8, 180, 1024, 32),
    (1, 8, 4096, 4096, 64),
    (1, 8, 16384, 16384, 64),
]
BRANCHES = 2
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_value_gradient": 4}
# Clocks, from a fit. A warp issues an instruction every 4 clocks, because most instructions need the result of the one
# before. WAIT is for each barrier, matrix product or copy that a step needs. LOAD is for loads that start only when the
# step needs them.
ISSUE, WAIT, LOAD = 4, 60, 600
# waits per step, counted in the kernels for compute capability 9.0
WAITS = {"forward": 5, "query_gradient": 7, "key_value_gradient": 16}
LAUNCH, MERGE = 1e-6, 2.5e-6  # assumed seconds of a launch in a graph and of one that merges splits


class Card(NamedTuple):
    """The data sheet of a card.

    The fields are the compilation target, the number of multiprocessors, the clock in GHz, the float16 rate of the
    matrix units in TFLOP/s, the memory rate in TB/s, and the shared memory of a multiprocessor in KiB.
    """

    target: str
    processors: int
    clock: float
    matrix: float
    memory: float
    shared: int


CARDS = {
    "A100": Card("sm_80", 108, 1.41, 312, 2.04, 164),
    "H100": Card("sm_90", 132, 1.83, 989, 3.35, 228),
    "H200": Card("sm_90", 132, 1.83, 989, 4.8, 228),
    "B200": Card("sm_100", 148, 1.86, 2250, 8.0, 228),
}


class Compiled(NamedTuple):
    """The resources of a compiled kernel: registers per thread, bytes of shared memory, and instructions per step."""

    registers: int
    shared: int
    step: int


class Times(NamedTuple):
    """The least time that a kernel can take under each bound, and the predicted time, in seconds."""

    instructions: float
    exponentials: float
    matrix: float
    bytes: float
    prediction: float


@functools.cache
def compiled(target: str, kernel: str, dim: int, bounded: bool) -> Compiled:
    """Return the resources of the float16 kernel for two branches, as compiled by the oldest Triton in the table.

    If `bounded`, they are those of the kernel with padding. A kernel whose last tile is not full needs about the same.
    """
    name = f"attention {kernel.replace('_', ' ')}: fp16, {dim} channels, two branches{', padding' if bounded else ''}"
    wanted = target, name
    with open(TABLE, newline="") as file:
        row = next(row for row in csv.DictReader(file) if (row["target"], row["kernel"]) == wanted)
    return Compiled(int(row["registers"]), int(row["shared"]), int(row["loop"]))


def times(card: Card, kernel: str, shape: tuple[int, ...]) -> Times:
    """Return the bounds and the predicted time of float16 attention of both branches on a card.

    Args:
        kernel: one of `KERNELS`.
        shape: B, H, Lq, Lk, D.
    """
    from sgalign.kernels import attention, configs

    batch, heads, queries, keys, dim = shape
    config = configs.lookup(kernel, card.target, 16, dim, BRANCHES, False)
    sizes = batch, heads, queries, dim, keys
    launch = attention.launch_for(kernel, config, sizes, BRANCHES, True, False, False, card.processors)
    taken = compiled(card.target, kernel, dim, launch.constants.get("BOUNDED", False))
    clocks = card.clock * 1e9
    scores = BRANCHES * batch * heads * queries * keys
    # Rows that are read or written for each query of both branches.
    rows = {"forward": 4, "query_gradient": 8, "key_value_gradient": 4}[kernel]
    moved = 2 * batch * heads * dim * (rows * queries + (4 if kernel == "key_value_gradient" else 2) * keys)

    steps = math.ceil(queries / config.block_q) if kernel == "key_value_gradient" else launch.span
    programs = math.prod(launch.grid)
    # The scores of one step of one program, and the clocks that a multiprocessor needs for it.
    of_step = BRANCHES * config.block_q * launch.constants["GROUPS"] * launch.constants["COLUMNS"]
    issue = taken.step * config.warps / 4
    products = 2 * PRODUCTS[kernel] * dim
    busy = max(issue, of_step / 16, products * of_step * clocks * card.processors / (card.matrix * 1e12))
    alone = ISSUE * taken.step + WAIT * WAITS[kernel] + (LOAD if config.stages == 1 else 0)
    resident = min(
        65536 // (32 * config.warps * 8 * math.ceil(taken.registers / 8)),
        1024 * card.shared // (taken.shared + 1024),
        64 // config.warps,
    )
    full, rest = divmod(math.ceil(programs / card.processors), resident)
    # A program begins and ends in about the time of a step.
    taking = (full * max(resident * busy, alone) + (max(rest * busy, alone) if rest else 0)) * (steps + 1)
    return Times(
        programs * steps * issue / (card.processors * clocks),
        scores / (card.processors * 16 * clocks),
        products * scores / (card.matrix * 1e12),
        moved / (card.memory * 1e12),
        taking / clocks + LAUNCH + (MERGE if launch.splits > 1 else 0),
    )


def main() -> None:
    """Print a Markdown table for each card: microseconds of each bound and of the prediction."""
    description = (__doc__ or "").split("\n")[0]
    argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=description).parse_args()
    print("All times are microseconds.")
    for name, card in CARDS.items():
        print(f"\n| {name}: B, H, Lq, Lk, D | kernel | {' | '.join(Times._fields)} |")
        print("|---|---|---|---|---|---|---|")
        for shape in SHAPES:
            for kernel in KERNELS:
                columns = " | ".join(f"{1e6 * time:.1f}" for time in times(card, kernel, shape))
                print(f"| {', '.join(map(str, shape))} | {kernel} | {columns} |")


if __name__ == "__main__":
    main()
