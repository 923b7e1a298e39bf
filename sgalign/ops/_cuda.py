"""Access to the CUDA part of the compiled core, to torch's streams and to the size of a GPU, and kernels' workspace."""

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
    """Return a sentence that says why the core has no CUDA kernels, or None if it has them."""
    if broken := _core.problem():
        return broken
    if not hasattr(_core.load(), "cuda_archs"):
        return (
            f"sgalign's compiled core was built without CUDA: put nvcc on PATH or set CUDA_HOME, unset SGALIGN_CUDA,"
            f" and {_core.BUILD} (docs/cuda.md)"
        )
    return None


def is_emulated() -> bool:
    """Return True if the core is the one that the tests build, which runs the CUDA kernels on the CPU."""
    return problem() is None and _core.load().cuda_archs == "emulated"


def core(device: torch.device) -> ModuleType:
    """Return the compiled core for tensors on `device`.

    `backends.choose` makes the same checks earlier, except while torch.compile traces the call.

    Raises:
        ImportError: if the core has no CUDA kernels.
        InputError: if the device is not a GPU.
    """
    if why := problem():
        raise ImportError(f"backend 'cuda' cannot be used: {why}")
    if device.type != "cuda" and not is_emulated():
        raise InputError(f"backend 'cuda' needs tensors on a GPU, got {device}; 'reference' works on any device")
    return _core.load()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is the current device.

    The context does nothing if the device is already current.
    """
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> tuple[int, int]:
    """Return the index of a device and torch's current stream on it, in the form that the core accepts."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch.cuda.current_stream(device).cuda_stream


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    For emulated kernels, return a small number. The tests then also cover work that is split among several blocks.
    """
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def workspace(like: Tensor, *sizes: int) -> Tensor:
    """Return an uninitialized float32 tensor on the device of `like`."""
    return like.new_empty(sizes, dtype=torch.float32)
