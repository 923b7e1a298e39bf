"""Code that all operations share: checks of tensors, their dtype under autocast, memory order, autograd.

The checks of ratios, seeds and streams are in random_mask.py, beside what these mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError

Tensors = list[Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/kernels.h


# ------------------------------------------------------------------------------------------------------ checks


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError for sparse and nested tensors, whose memory the kernels cannot read."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the kernels know the dtype."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_bool(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a dense tensor of bool, a mask."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a bool tensor, True = dropped, got {got}")
    check_dense(name, tensor)


def check_dtype(name: str, tensor: Tensor, other: Tensor, whose: str) -> None:
    """Raise TypeError unless both tensors are computed in one dtype, which the message calls `whose`."""
    if computed_dtype(tensor) != computed_dtype(other):
        raise TypeError(f"{name} must have {whose} {other.dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """Raise InputError unless `tensor` is on `device`, which the message calls `whose`."""
    if tensor.device != device:
        raise InputError(f"{name} must be on {whose} {device}, got {tensor.device}")


# ------------------------------------------------------------------------------------------------------ dtypes


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, or what autocast makes of it."""
    device = tensor.device.type
    # torch.is_autocast_enabled knows no meta tensors.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels sum operands of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------ memory


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last stride is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised tensor with last stride 1 and, where that is possible, the memory order of `tensor`.

    The order of a ``[B, L, H * D]`` projection survives, so that the way back to it needs no copy.
    """
    out = torch.empty_like(tensor)
    # For a tensor that overlaps itself, empty_like chooses its own order.
    return out if out.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def distinct(tensors: list[Any]) -> list[Any]:
    """Replace repeated tensors by views, because torch.compile passes no tensor twice to an autograd function.

    None stays None.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return found


# ------------------------------------------------------------------------------------------------------ autograd


def differentiable_once(what: str, gradients: Callable[..., Any]) -> type[torch.autograd.Function]:
    """Return `gradients`, which a backward pass calls, as an autograd function that cannot be differentiated again.

    Args:
        what: the operation that `gradients` belongs to, as the error names it.
        gradients: called with the arguments of ``apply``.
    """
    message = (
        f"sgalign: second-order gradients of {what} are not supported (create_graph=True, or a gradient of a gradient);"
        " backend='reference' has them"
    )

    class Gradients(torch.autograd.Function):
        forward = staticmethod(gradients)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(message)

    return Gradients
