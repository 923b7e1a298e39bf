"""Which backend serves a call. Each operation has a table of what its backends launch.

A new backend needs an entry in those tables and a record in `BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda

# Triton itself is not imported before a GPU is used: it looks for a driver.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class Backend(NamedTuple):
    """The requirements of a backend."""

    device: str | None  # of the tensors; None is any. Those for "cuda", ROCm's too, compute in float32 at most
    problem: Callable[[], str | None]  # returns why it is not there and how to get it, or None
    is_emulated: Callable[[], bool] = lambda: False  # returns whether one for GPUs runs on the CPU, for tests
    capability: tuple[int, int] = (0, 0)  # the least compute capability, of NVIDIA's GPUs


def interpreter_problem() -> str | None:
    """Return why Triton's interpreter cannot run here and what to do; None if it can.

    The one of Triton 3.6 takes arrays of one element for numbers, which numpy refuses since 2.4.
    """
    if not HAS_TRITON:
        return None
    triton, numpy = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    old, new = (tuple(map(int, version.split(".")[:2])) for version in (triton, numpy))
    if old >= (3, 7) or new < (2, 4):
        return None
    return f"Triton {triton}'s interpreter cannot run with numpy {numpy}: `pip install 'numpy<2.4'`, or Triton 3.7"


_INTERPRETER_PROBLEM = interpreter_problem() if INTERPRETED else None  # torch.compile cannot trace the question


def _triton_problem() -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: `pip install triton` (torch for CUDA or ROCm brings it)"
    return _INTERPRETER_PROBLEM


def _cuda_problem() -> str | None:
    # torch.compile cannot trace how the core is loaded; where it has no CUDA, the operation itself says so.
    return None if torch.compiler.is_compiling() else _cuda.problem()


def _cuda_is_emulated() -> bool:
    return torch.compiler.is_compiling() or _cuda.is_emulated()


BACKENDS = {
    "cpu": Backend("cpu", _core.problem),
    "triton": Backend("cuda", _triton_problem, lambda: INTERPRETED, (8, 0)),
    "cuda": Backend("cuda", _cuda_problem, _cuda_is_emulated, (8, 0)),
    "reference": Backend(None, lambda: None),
}
ON_GPU = tuple(name for name, needs in BACKENDS.items() if needs.device == "cuda")  # None takes the first that is there


def check_name(backend: str | None) -> None:
    """Raise InputError unless `backend` is the name of one, or None."""
    if backend is not None and backend not in (*BACKENDS,):  # a tuple, since a list has no hash
        raise InputError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")


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
    check_name(backend)
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda" and dtype != torch.float64:
            return next((name for name in ON_GPU if not _problem_on(name, device)), "reference")
        return "reference"
    needs = BACKENDS[backend]
    if needs.device == "cpu" and device.type != "cpu":
        raise InputError(f"backend {backend!r} needs tensors on the CPU, got {device}; 'reference' serves any device")
    if needs.device == "cuda":
        if dtype == torch.float64:
            raise InputError(
                f"backend {backend!r} computes in float32 at most, got float64; 'reference' serves any dtype"
            )
        if problem := needs.problem():
            raise ImportError(f"backend {backend!r} cannot be used: {problem}")
        if device.type != "cuda" and not (device.type == "cpu" and needs.is_emulated()):
            raise InputError(f"backend {backend!r} needs tensors on a GPU, got {device}; 'reference' serves any device")
        if device.type == "cpu" and backend == "triton" and dtype == torch.bfloat16:
            raise InputError("backend 'triton' needs a GPU for bfloat16: Triton's interpreter multiplies it wrongly")
        if problem := _too_old(backend, device):
            raise InputError(f"backend {backend!r} {problem}; 'reference' serves any device")
    return backend


def unavailable(backend: str) -> str | None:
    """Return why `backend` cannot be used here and how to get it; None if it can."""
    needs = BACKENDS[backend]
    if (problem := needs.problem()) or needs.device != "cuda":
        return problem
    if not torch.cuda.is_available():
        return None if needs.is_emulated() else _no_gpu()
    return _too_old(backend, torch.device("cuda"))


def _no_gpu() -> str:
    if built := torch.version.cuda or torch.version.hip:
        platform = "CUDA" if torch.version.cuda else "ROCm"
        return f"torch finds no GPU here; if there is one, see whether its driver is there and knows {platform} {built}"
    return "this torch is for the CPU alone: install one for CUDA or ROCm"


def _problem_on(backend: str, device: torch.device) -> str | None:
    return BACKENDS[backend].problem() or _too_old(backend, device)


def _too_old(backend: str, device: torch.device) -> str | None:
    """Return what a GPU lacks for a backend, as the rest of a sentence; None if nothing."""
    # torch.compile cannot trace the question.
    if device.type != "cuda" or torch.version.hip or torch.compiler.is_compiling():
        return None
    least, found = BACKENDS[backend].capability, _capability(device)
    if found is None or found >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]} or later, {device} has {found[0]}.{found[1]}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's compute capability; None where a fake tensor's device is not there to be asked."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
