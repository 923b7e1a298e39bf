"""Which backend serves a call. Each operation has a table of what its backends launch."""

from __future__ import annotations

import importlib.util
import os

import torch

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda

ON_GPU = ("triton", "cuda")  # in the order in which None takes what is there
BACKENDS = ("cpu", *ON_GPU, "reference")
# Triton itself is not imported before a GPU is used: it looks for a driver.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend asked for, or the fastest that serves `device` and `dtype`.

    Args:
        backend: "cpu" (the compiled core), "triton" or "cuda" (its CUDA C++ kernels) for GPUs, "reference" (plain
            PyTorch, any device), or None, which takes Triton on a GPU if it is there: no measurement says otherwise.
            NVIDIA's GPUs before compute capability 8.0 get the reference.
        device: of the operands.
        dtype: in which the operation computes.

    Raises:
        ValueError: no such backend, or it does not serve the device or the dtype.
        ImportError: it would, but is not there.
    """
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda" and dtype != torch.float64 and not _too_old(device):
            return next((backend for backend in ON_GPU if not _problem(backend)), "reference")
        return "reference"
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise InputError(f"backend 'cpu' needs tensors on the CPU, got {device}; 'reference' serves any device")
    if backend in ON_GPU:
        if dtype == torch.float64:
            raise InputError(
                f"backend {backend!r} computes in float32 at most, got float64; 'reference' serves any dtype"
            )
        if problem := _problem(backend):
            raise ImportError(f"backend {backend!r} cannot be used: {problem}")
        if device.type != "cuda" and not (device.type == "cpu" and _is_emulated(backend)):
            raise InputError(f"backend {backend!r} needs tensors on a GPU, got {device}; 'reference' serves any device")
        if device.type == "cpu" and backend == "triton" and dtype == torch.bfloat16:
            raise InputError("backend 'triton' needs a GPU for bfloat16: Triton's interpreter multiplies it wrongly")
        if problem := _too_old(device):
            raise InputError(f"backend {backend!r} {problem}; 'reference' serves any device")
    return backend


def unavailable(backend: str) -> str | None:
    """Return why `backend` cannot be used here and how to get it; None if it can."""
    if backend == "cpu":
        return _core.problem()
    if backend in ON_GPU:
        if problem := _problem(backend):
            return problem
        if not torch.cuda.is_available():
            return None if _is_emulated(backend) else _no_gpu()
        return _too_old(torch.device("cuda"))
    return None


def _no_gpu() -> str:
    if built := torch.version.cuda or torch.version.hip:
        platform = "CUDA" if torch.version.cuda else "ROCm"
        return f"torch finds no GPU here; if there is one, see whether its driver is there and knows {platform} {built}"
    return "this torch is for the CPU alone: install one for CUDA or ROCm"


def _problem(backend: str) -> str | None:
    if backend == "triton":
        return (
            None if HAS_TRITON else "triton is not installed: `pip install triton` (torch for CUDA or ROCm brings it)"
        )
    # torch.compile cannot trace how the core is loaded; where it has no CUDA, the operation itself says so.
    return None if torch.compiler.is_compiling() else _cuda.problem()


def _too_old(device: torch.device) -> str | None:
    """Return what a GPU lacks for our kernels, as the rest of a sentence; None if nothing."""
    # torch.compile cannot trace the question; a fake tensor's device may not be there to be asked.
    if device.type != "cuda" or torch.version.hip or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0 or later, {device} has {major}.{minor}"


def _is_emulated(backend: str) -> bool:
    """Return whether a backend for GPUs runs on the CPU, for tests."""
    return INTERPRETED if backend == "triton" else torch.compiler.is_compiling() or _cuda.is_emulated()
