"""The choice of the backend for a call.

Each operation has tables that map a backend to its launch function: `FORWARD` and `BACKWARD` in _attention_backends.py
and _relation_backends.py, and `_LAUNCH` in alignment.py and random_mask.py. To add a backend, add an
entry to each of these tables and a record to `BACKENDS`.
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

# Triton looks for a driver when it is imported, so the import waits until a GPU is used.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class Backend(NamedTuple):
    """The requirements of a backend."""

    # The device type of the tensors, or None for any. "cuda" includes ROCm, and means that float64 is not supported.
    device: str | None
    problem: Callable[[], str | None]  # returns why the backend is missing and how to get it, or None
    is_emulated: Callable[[], bool] = lambda: False  # returns True if a GPU backend runs on the CPU, for tests
    capability: tuple[int, int] = (0, 0)  # the lowest that the backend supports, on NVIDIA GPUs


def interpreter_problem() -> str | None:
    """Return why Triton's interpreter cannot run here and what to do about it, or None if it can.

    The interpreter of Triton 3.6 uses arrays of one element as numbers. numpy has rejected this since version 2.4.
    """
    if not HAS_TRITON:
        return None
    triton, numpy = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    old, new = (tuple(map(int, version.split(".")[:2])) for version in (triton, numpy))
    if old >= (3, 7) or new < (2, 4):
        return None
    return (
        f"Triton {triton}'s interpreter cannot run with numpy {numpy}: run `pip install 'numpy<2.4'`,"
        " or install Triton 3.7 or later"
    )


_INTERPRETER_PROBLEM = interpreter_problem() if INTERPRETED else None  # torch.compile cannot trace this check


def _triton_problem() -> str | None:
    if not HAS_TRITON:
        return "triton is not installed: `pip install triton` (torch for CUDA or ROCm includes it)"
    return _INTERPRETER_PROBLEM


def _cuda_problem() -> str | None:
    # torch.compile cannot trace the loading of the core. If the core has no CUDA kernels, the operation raises the
    # error later.
    return None if torch.compiler.is_compiling() else _cuda.problem()


def _cuda_is_emulated() -> bool:
    return torch.compiler.is_compiling() or _cuda.is_emulated()


BACKENDS = {
    "cpu": Backend("cpu", _core.problem),
    "triton": Backend("cuda", _triton_problem, lambda: INTERPRETED, (8, 0)),
    "cuda": Backend("cuda", _cuda_problem, _cuda_is_emulated, (8, 0)),
    "reference": Backend(None, lambda: None),
}
# the GPU backends; backend=None uses the first available one
ON_GPU = tuple(name for name, needs in BACKENDS.items() if needs.device == "cuda")


def check_name(backend: str | None) -> None:
    """Raise InputError unless `backend` is the name of a backend or None."""
    if backend is not None and backend not in (*BACKENDS,):  # a tuple, because `backend` may be unhashable
        raise InputError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return the requested backend, or the default backend for `device` and `dtype`.

    Args:
        backend: "cpu" (the compiled core), "triton" or "cuda" for GPUs ("cuda" is the core's CUDA C++ kernels),
            "reference" (plain PyTorch, on any device), or None. On the CPU, None selects "cpu". On a GPU, it selects
            "triton" if it is available, because it takes less time on the device in nearly all measurements, and
            otherwise "cuda" if that is available. In all other cases, it selects "reference": in float64 on a GPU, on
            NVIDIA GPUs with compute capability below 8.0, without either GPU backend, and on other devices.
        device: the device of the operands.
        dtype: the dtype in which the operation computes.

    Raises:
        InputError: if there is no such backend, or it does not support the device or the dtype.
        ImportError: if a GPU backend is requested but not available. If the compiled core is missing, the "cpu" backend
            raises this error later, when it is launched.
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
        raise InputError(f"backend {backend!r} needs tensors on the CPU, got {device}; 'reference' works on any device")
    if needs.device == "cuda":
        if dtype == torch.float64:
            raise InputError(f"backend {backend!r} does not support float64; 'reference' works with any dtype")
        if problem := needs.problem():
            raise ImportError(f"backend {backend!r} cannot be used: {problem}")
        if device.type != "cuda" and not (device.type == "cpu" and needs.is_emulated()):
            raise InputError(
                f"backend {backend!r} needs tensors on a GPU, got {device}; 'reference' works on any device"
            )
        if device.type == "cpu" and backend == "triton" and dtype == torch.bfloat16:
            raise InputError(
                "backend 'triton' needs a GPU for bfloat16, because Triton's interpreter multiplies it incorrectly"
            )
        if problem := _too_old(backend, device):
            raise InputError(f"backend {backend!r} {problem}; 'reference' works on any device")
    return backend


def unavailable(backend: str) -> str | None:
    """Return why `backend` cannot be used here and how to get it, or None if it can be used."""
    needs = BACKENDS[backend]
    if (problem := needs.problem()) or needs.device != "cuda":
        return problem
    if not torch.cuda.is_available():
        return None if needs.is_emulated() else _no_gpu()
    return _too_old(backend, torch.device("cuda"))


def _no_gpu() -> str:
    if built := torch.version.cuda or torch.version.hip:
        platform = "CUDA" if torch.version.cuda else "ROCm"
        return f"torch finds no GPU here; if there is one, it needs a driver that supports {platform} {built}"
    return "this build of torch supports only the CPU: install one for CUDA or ROCm"


def _problem_on(backend: str, device: torch.device) -> str | None:
    return BACKENDS[backend].problem() or _too_old(backend, device)


def _too_old(backend: str, device: torch.device) -> str | None:
    """Return a phrase that says why a GPU is too old for a backend, or None if it is not."""
    # torch.compile cannot trace this check.
    if device.type != "cuda" or torch.version.hip or torch.compiler.is_compiling():
        return None
    least, found = BACKENDS[backend].capability, _capability(device)
    if found is None or found >= least:
        return None
    return f"needs compute capability {least[0]}.{least[1]} or higher, but {device} has {found[0]}.{found[1]}"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a GPU, or None if a fake tensor names a GPU that this machine lacks."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
