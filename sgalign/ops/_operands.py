"""Code that all operations share: checks of tensors, their dtype under autocast, memory order.

The checks of ratios, seeds and streams are in random_mask.py, beside what these mean.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sgalign.errors import InputError

Tensors = list[Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/kernels.h
REMEMBERED = 4096  # signatures of an operation


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


def once_a_signature(check: Callable[..., None]) -> Callable[..., None]:
    """Return a check of tensors that runs once for the same shapes, dtypes and devices, and again after an error.

    The first argument of the result says whether the others, tensors or None, are ordinary (`_autograd.is_plain`): the
    check of others always runs.
    """
    passed: set[tuple[object, ...]] = set()

    def run(plain: bool, *tensors: Tensor | None) -> None:
        if not plain or torch._C._is_any_autocast_enabled():  # which decides whether dtypes go together
            check(*tensors)
            return
        signature = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
        if signature not in passed:
            check(*tensors)
            if len(passed) == REMEMBERED:
                passed.clear()
            passed.add(signature)

    return run


# ------------------------------------------------------------------------------------------------------ dtypes


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, or what autocast makes of it."""
    if not torch._C._is_any_autocast_enabled():
        return tensor.dtype
    device = tensor.device.type
    # torch.is_autocast_enabled knows no meta tensors.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which torch's own operations keep the dtypes of their operands."""
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":  # torch has no autocast for it
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels sum operands of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`: itself where it has it, without asking torch."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# ------------------------------------------------------------------------------------------------------ memory


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last stride is not 1."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialised tensor with last stride 1 and, where that is possible, the memory order of `tensor`.

    The order of a ``[B, L, H * D]`` projection survives, so that the way back to it needs no copy.
    """
    out = torch.empty_like(tensor)
    # For a tensor that overlaps itself, empty_like chooses its own order.
    return out if out.stride()[-1] == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)
