"""What bounds attention on a GPU, from counted instructions: `python -m benchmarks.roofline` prints the table.

Each program's step is counted in the compiled kernel (tests/compiled_kernels.csv); how many steps a shape takes is
arithmetic. A multiprocessor issues 128 instructions of a thread a clock and takes 16 exponentials; the matrix products
and the bytes of operands and results, each moved once, have the card's rates. The longest of the four is the bound.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).parent.parent / "tests" / "compiled_kernels.csv"
SHAPES = [
    (1, 8, 180, 608, 32),
    (8, 8, 180, 100, 32),
    (8, 8, 180, 608, 32),
    (8, 8, 180, 1024, 32),
    (1, 8, 16384, 16384, 32),
]


class Card(NamedTuple):
    """Data sheet: multiprocessors, clock in GHz, float16 matrix units in TFLOP/s, memory in TB/s."""

    target: str
    processors: int
    clock: float
    matrix: float
    memory: float


CARDS = {
    "A100": Card("sm_80", 108, 1.41, 312, 2.04),
    "H100": Card("sm_90", 132, 1.83, 989, 3.35),
    "H200": Card("sm_90", 132, 1.83, 989, 4.8),
    "B200": Card("sm_100", 148, 1.86, 2250, 8.0),
}


def bounds(card: Card, kernel: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds that float16 attention of both branches takes at least, by what bounds it.

    Args:
        kernel: "forward", "query_gradient" or "key_value_gradient".
        shape: B, H, Lq, Lk, D.
    """
    from sgalign.kernels import attention, configs

    batch, heads, queries, keys, dim = shape
    plan = configs.lookup(kernel, card.target, 16, dim, 2, False)
    tiling = attention.Tiling.of(plan, True, keys)
    with open(TABLE, newline="") as file:
        name = f"attention {kernel.replace('_', ' ')}: fp16, {dim} channels, two branches"
        row = next(row for row in csv.DictReader(file) if (row["target"], row["kernel"]) == (card.target, name))
    steps = batch * heads * math.ceil(queries / plan.block_q) * tiling.count
    scores = 2 * batch * heads * queries * keys
    products = {"forward": 2, "query_gradient": 3, "key_value_gradient": 4}[kernel]
    rows = {"forward": 4, "query_gradient": 8, "key_value_gradient": 4}[kernel]  # of queries read and written
    moved = 2 * batch * heads * dim * (rows * queries + (4 if kernel == "key_value_gradient" else 2) * keys)
    return {
        "instructions": steps * int(row["loop"]) * 32 * plan.warps / (card.processors * 128 * card.clock * 1e9),
        "exponentials": scores / (card.processors * 16 * card.clock * 1e9),
        "matrix products": 2 * products * dim * scores / (card.matrix * 1e12),
        "bytes": moved / (card.memory * 1e12),
    }


def main() -> None:
    """Prints a Markdown table a card: microseconds of each bound, and instructions of a thread a score and branch."""
    for name, card in CARDS.items():
        print(
            f"\n| {name}: B, H, Lq, Lk, D | kernel | instructions | exponentials | matrix products | bytes | a score |"
        )
        print("|---|---|---|---|---|---|---|")
        for shape in SHAPES:
            for kernel in ("forward", "query_gradient", "key_value_gradient"):
                times = bounds(card, kernel, shape)
                each = times["instructions"] * card.processors * 128 * card.clock * 1e9 / (2 * math.prod(shape[:4]))
                columns = [*(f"{1e6 * time:.1f}" for time in times.values()), f"{each:.1f}"]
                print(f"| {', '.join(map(str, shape))} | {kernel} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
