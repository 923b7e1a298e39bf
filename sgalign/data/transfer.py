"""Copies between host and device that make the host wait as little as can be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`, for which the host does not wait where it is sent to a GPU."""
    if device.type in ("cpu", "mps"):  # on MPS such a copy races with what reads it
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()  # CUDA reads pageable memory while the host waits
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype and device on the host, in a single copy, for which the host waits once."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class HostCopy:
    """A copy of a tensor on its way to the host; what is queued on the device after it goes on meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=tensor.device.type not in ("cpu", "mps"))
        self.arrived: torch.Event | None = None
        if tensor.device.type not in ("cpu", "mps"):
            self.arrived = torch.Event(tensor.device)
            self.arrived.record(torch.accelerator.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Return the copy, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy
