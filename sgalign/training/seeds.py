"""The seed of what a training step draws."""

from __future__ import annotations

import hashlib
import struct


def step_seed(run_seed: int, step: int, micro_batch: int, rank: int, *, purpose: str = "mask") -> int:
    """Return a seed in the range of int64 for what one step draws; any change of an argument gives an unrelated one.

    Of explicit arguments rather than of torch's generator, so that ranks differ and a resumed run repeats.
    """
    packed = struct.pack("<4q", *(value % (1 << 64) - (1 << 63) for value in (run_seed, step, micro_batch, rank)))
    digest = hashlib.blake2b(packed, digest_size=8, person=b"" if purpose == "mask" else purpose.encode())
    return int.from_bytes(digest.digest(), "little", signed=True)
