"""What kernels must know about where they run."""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Under the interpreter a few, so that splits are tested."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def dot_precision() -> str:
    """How products of float32 matrices are computed: three products of TF32 on NVIDIA's tensor cores, else exactly.

    The three have the error of float32, where one, Triton's default, has that of ten bits.
    """
    return "ieee" if torch.version.hip else "tf32x3"


def is_interpreting() -> bool:
    """Whether kernels run on the CPU, in Python: TRITON_INTERPRET was set when they were imported."""
    return bool(triton.knobs.runtime.interpret)
