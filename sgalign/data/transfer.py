"""Copies between host and device that make the host wait as little as possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. The host does not wait for a copy to a GPU."""
    if device.type in ("cpu", "mps"):  # on MPS an asynchronous copy races with operations that read it
        return tensor.to(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()  # CUDA copies pageable memory synchronously
    return tensor.to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one dtype and device on the host. They are copied together, so the host waits only once."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class HostCopy:
    """An asynchronous copy of a tensor to the host. Later work on the device does not wait for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().to("cpu", non_blocking=tensor.device.type not in ("cpu", "mps"))
        self.arrived: torch.Event | None = None
        if tensor.device.type not in ("cpu", "mps"):
            self.arrived = torch.Event(tensor.device)
            self.arrived.record(torch.accelerator.current_stream(tensor.device))

    def read(self) -> Tensor:
        """Wait for the copy to finish and return it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.copy
