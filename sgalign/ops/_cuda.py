"""The CUDA part of the compiled core, torch's streams, the size of a GPU, and memory for kernels to work in."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core


def problem() -> str | None:
    """Return why the core has no CUDA kernels, in one sentence, or None."""
    if broken := _core.problem():
        return broken
    if not hasattr(_core.load(), "cuda_archs"):
        return (
            f"sgalign's compiled core was built without CUDA: put nvcc on PATH or set CUDA_HOME, leave SGALIGN_CUDA"
            f" out, and {_core.BUILD} (docs/cuda.md)"
        )
    return None


def is_emulated() -> bool:
    """Return whether the core is that of the tests, which runs the kernels on the CPU."""
    return problem() is None and _core.load().cuda_archs == "emulated"


def core(device: torch.device) -> ModuleType:
    """Return the compiled core for tensors on `device`.

    `backends.choose` has asked the same before, but not where torch.compile traced it.

    Raises:
        ImportError: it has no CUDA kernels.
        ValueError: the device is no GPU.
    """
    if why := problem():
        raise ImportError(f"backend 'cuda' cannot be used: {why}")
    if device.type != "cuda" and not is_emulated():
        raise InputError(f"backend 'cuda' needs tensors on a GPU, got {device}; 'reference' serves any device")
    return _core.load()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current one; nothing is entered where it is so already."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> tuple[int, int]:
    """Return a device's index and torch's current stream on it, as the core takes them."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors.

    Where kernels are emulated they are a few, so that tests see work that is split.
    """
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def workspace(like: Tensor, *sizes: int) -> Tensor:
    """Return uninitialised float32 memory on the device of `like`."""
    return like.new_empty(sizes, dtype=torch.float32)
