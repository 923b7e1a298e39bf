"""What GPU kernels need of torch: streams, the size of a GPU, and memory to work in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core


def problem() -> str | None:
    """Why the core has no CUDA kernels, in one sentence, or None."""
    if broken := _core.problem():
        return broken
    if not hasattr(_core.load(), "cuda_archs"):
        return (
            f"sgalign's compiled core was built without CUDA: put nvcc on PATH or set CUDA_HOME, leave SGALIGN_CUDA"
            f" out, and {_core.BUILD} (docs/cuda.md)"
        )
    return None


def is_emulated() -> bool:
    """Whether the core is that of the tests, which runs the kernels on the CPU."""
    return problem() is None and _core.load().cuda_archs == "emulated"


def core(device: torch.device) -> ModuleType:
    """The compiled core for tensors on `device`: asked where torch.compile could not trace the question before.

    Raises:
        ImportError: it has no CUDA kernels.
        ValueError: the device is no GPU.
    """
    if why := problem():
        raise ImportError(f"backend 'cuda' cannot be used: {why}")
    if device.type != "cuda" and not is_emulated():
        raise InputError(f"backend 'cuda' needs tensors on a GPU, got {device}; 'reference' serves any device")
    return _core.load()


@contextlib.contextmanager
def queue(device: torch.device) -> Iterator[tuple[int, int]]:
    """Makes `device` current; its index and torch's current stream on it, as the core takes them."""
    if device.type == "cpu":
        yield 0, 0
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device)
        yield stream.device_index, stream.cuda_stream


def multiprocessors(device: torch.device) -> int:
    """Of a GPU. Where kernels are emulated a few, so that tests see work that is split."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def workspace(like: Tensor, *sizes: int) -> Tensor:
    return like.new_empty(sizes, dtype=torch.float32)
