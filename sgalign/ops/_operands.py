"""Code that all operations share: checks of tensors, dtypes under autocast, and memory order.

The checks of ratios, seeds and streams are in random_mask.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from sgalign.errors import InputError

Tensors = list[Tensor]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/kernels.h
REMEMBERED = 512  # signatures remembered per operation, about 1 KiB each


# ------------------------------------------------------------------------------------------------------ checks


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise TypeError if `tensor` is sparse, nested or distributed, because the kernels cannot read its memory."""
    distributed = sys.modules.get("torch.distributed.tensor")  # not imported here, because the import takes long
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        # The random mask depends on the global indices of heads and batch, which a local kernel does not know.
        raise TypeError(
            f"{name} must be a local tensor, got a DTensor: use torch.distributed.tensor.experimental.local_map"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the kernels support the dtype of `tensor`."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_bool(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a mask, a dense bool tensor."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a bool tensor, True = dropped, got {got}")
    check_dense(name, tensor)


def check_dtype(name: str, tensor: Tensor, other: Tensor, whose: str) -> None:
    """Raise TypeError unless operations use both tensors in the same dtype.

    `whose` describes the dtype of `other` in the message, such as "the query's dtype".
    """
    if computed_dtype(tensor) != computed_dtype(other):
        raise TypeError(f"{name} must have {whose} {other.dtype}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    """Raise InputError unless `tensor` is on `device`.

    `whose` describes the device in the message, such as "the query's device".
    """
    if tensor.device != device:
        raise InputError(f"{name} must be on {whose} {device}, got {tensor.device}")


def readable(tensor: Tensor) -> Tensor | None:
    """Return a tensor with the values of `tensor`, or None if a check must not read them.

    The host would wait for a GPU, and it cannot read values while they are traced. If this returns None, the check uses
    `torch._assert_async`. Inside `torch.vmap`, the result also has the dimension that vmap hides.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    keys = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY)):
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor if type(tensor) in (Tensor, Parameter) else None  # a fake tensor has no values


def dropped_entries(mask: Tensor, lowest: float, rule: str) -> Tensor:
    """Return a floating-point mask as bool, True = dropped.

    The mask must hold only 0 (kept) and numbers up to `lowest` (dropped). If it holds another, this raises InputError
    with the message `rule`, or where the values cannot be read, `torch._assert_async` fails.
    """
    values = readable(mask)
    if values is None:
        torch._assert_async(((mask == 0) | (mask <= lowest)).all(), rule)
    elif (wrong := ~((values == 0) | (values <= lowest))).any():  # NaN is wrong, too
        raise InputError(f"{rule}, got {values[wrong][0].item()}")
    return mask <= lowest


def differs(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Return True if a shape is not the expected one.

    torch.compile may not know a size, such as the number of rows from `nonzero`. It then takes the size as right, and
    compares it when the compiled code runs.
    """
    if not torch.compiler.is_compiling():
        return tuple(shape) != tuple(expected)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # the import takes long

    if len(shape) != len(expected):
        return True
    for size, wanted in zip(shape, expected):
        if guard_or_false(size != wanted):
            return True
        torch._check(size == wanted)
    return False


def once_a_signature(check: Callable[..., None]) -> Callable[..., None]:
    """Wrap a check of tensors, which then runs once for each combination of shapes, dtypes and devices.

    A check that raised an error runs again at the next call. The first argument of the wrapped check is the result of
    `_autograd.is_plain` for the other arguments, which are tensors or None. If it is False, the check always runs.
    """
    passed: set[tuple[object, ...]] = set()

    def run(plain: bool, *tensors: Tensor | None) -> None:
        if not plain or torch._C._is_any_autocast_enabled():  # autocast decides whether the dtypes match
            check(*tensors)
            return
        signature = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
        if signature not in passed:
            check(*tensors)
            if len(passed) >= REMEMBERED:  # threads that add at the same time may exceed it
                passed.clear()
            passed.add(signature)

    return run


# ------------------------------------------------------------------------------------------------------ dtypes


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which operations use a tensor.

    It is the tensor's own dtype or, under autocast, autocast's. Autocast leaves float64 unchanged.
    """
    if not torch._C._is_any_autocast_enabled():
        return tensor.dtype
    device = tensor.device.type
    # torch.is_autocast_enabled does not accept the meta device.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which torch's own operations keep the dtypes of their operands."""
    if not torch._C._is_any_autocast_enabled() or device.type == "meta":  # torch has no autocast for meta tensors
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def accumulated_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the kernels sum operands of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in `dtype`. torch is not called if the tensor already has that dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# ------------------------------------------------------------------------------------------------------ memory


def unit_stride(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it if its last stride is not 1."""
    return tensor if tensor.stride()[-1] == 1 else tensor.contiguous()


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized tensor with last stride 1 and, if possible, the memory order of `tensor`.

    The memory order of a ``[B, L, H * D]`` projection is kept, so no copy is needed to restore that layout.
    """
    out = torch.empty_like(tensor)
    # If the elements of a tensor overlap in memory, empty_like chooses another order.
    return out if out.stride()[-1] == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)
