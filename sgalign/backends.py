"""Which implementation serves a call."""

from __future__ import annotations

import torch

from sgalign import _core

BACKENDS = ("cpu", "reference")


def choose(backend: str | None, device: torch.device) -> str:
    """The backend asked for, or the fastest that serves `device`.

    Args:
        backend: "cpu" (the compiled core), "reference" (plain PyTorch, any device), or None.
        device: of the query.

    Raises:
        ValueError: no such backend, or it does not serve the device.
    """
    if backend is None:
        return "cpu" if device.type == "cpu" else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, got {device}; 'reference' serves any device")
    return backend


def unavailable(backend: str) -> str | None:
    """Why `backend` cannot be used here and how to get it; None if it can."""
    return _core.problem() if backend == "cpu" else None
