"""The seeds of a training step's random draws."""

from __future__ import annotations

import hashlib
import struct


def step_seed(run_seed: int, step: int, micro_batch: int, rank: int, *, purpose: str = "mask") -> int:
    """Return a seed in the range of int64 for the draws of one step.

    Changing any argument gives an unrelated seed. The seed does not depend on torch's generator. Therefore ranks draw
    different numbers, and a resumed run draws the same numbers as an uninterrupted one.

    Args:
        run_seed: seed of the run.
        step: index of the step.
        micro_batch: index of the batch.
        rank: rank of the process.
        purpose: name of the draws. Draws for different purposes get unrelated seeds.
    """
    packed = struct.pack("<4q", *(value % (1 << 64) - (1 << 63) for value in (run_seed, step, micro_batch, rank)))
    digest = hashlib.blake2b(packed, digest_size=8, person=b"" if purpose == "mask" else purpose.encode())
    return int.from_bytes(digest.digest(), "little", signed=True)
