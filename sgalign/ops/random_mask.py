"""The random mask and the checks of its parameters: a threshold from 0 to 65536, a 64-bit seed and a stream."""

from __future__ import annotations

import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops._operands import check_dense
from sgalign.ops._registration import register

STEPS = 1 << 16  # a ratio is a multiple of 1/65536


def random_attention_mask(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    *,
    ratio: float,
    seed: int | Tensor,
    stream: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the mask that `fused_masked_attention` draws for the same ratio, seed and stream.

    An entry depends only on `ratio`, `seed`, `stream` and its indices ``(b * heads + h, q, k)``. It is the same on
    every device and with every backend. `sgalign.ops.reference.random_mask` is the definition.

    Args:
        batch, heads, queries, keys: the shape of the mask, each at least 0.
        ratio: the probability of dropping an entry, in [0, 1], rounded to a multiple of 1/65536.
        seed: an int in [-2**63, 2**63), or an int64 tensor with one element.
        stream: a number in [0, 2**31). Masks with the same seed and different streams are independent.
        device: the device of the mask. If None, the device of a seed tensor, otherwise the CPU.

    Returns:
        The mask, bool ``[batch, heads, queries, keys]``. True means dropped.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or is out of its range.
        ImportError: if the compiled core is not built or was built from other sources.
    """
    for name, size in (("batch", batch), ("heads", heads), ("queries", queries), ("keys", keys)):
        check_int(size, name)
        if size < 0:
            raise InputError(f"{name} must be at least 0, got {size}")
    check_stream(stream, "stream")
    ratio = checked_ratio(ratio, "ratio")
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    if seed is None:
        raise TypeError("seed must be an int or an int64 tensor, got None")
    device = torch.empty(0, device=device).device  # gives "cuda" an index
    check_seed(seed, device, "seed")
    seed = seed_tensor(seed, device)
    backend = backends.choose(None, seed.device, torch.bool)
    return torch.ops.sgalign.random_mask(backend, seed, batch, heads, queries, keys, ratio, stream)


def checked_ratio(ratio: float, name: str) -> float:
    """Return `ratio` as a float, or raise TypeError or InputError unless it is a number in [0, 1]."""
    if type(ratio) is not float and (isinstance(ratio, bool) or not isinstance(ratio, (numbers.Real, torch.SymFloat))):
        raise TypeError(f"{name} must be a number, got {type(ratio).__name__}")
    if not 0 <= ratio <= 1:  # also catches NaN
        raise InputError(f"{name} must be in [0, 1], got {ratio}")
    return ratio if type(ratio) is float or isinstance(ratio, torch.SymFloat) else float(ratio)


def ratio_threshold(ratio: float) -> int:
    """Return ``round(65536 * ratio)``.

    An entry is dropped if its 16-bit random number is below this threshold.
    """
    return round(STEPS * ratio)


def check_int(value: int, name: str) -> None:
    """Raise TypeError unless `value` is an int."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_stream(stream: int, name: str) -> None:
    """Raise TypeError or InputError unless `stream` is an int in [0, 2**31)."""
    check_int(stream, name)
    if not 0 <= stream < reference.DROPOUT_STREAM_BIT:
        raise InputError(f"{name} must be in [0, 2**31), got {stream}")


def check_seed(seed: int | Tensor | None, device: torch.device, name: str) -> None:
    """Raise TypeError or InputError unless `seed` is valid.

    A seed is None, a signed 64-bit int, or an int64 tensor with one element on `device`.
    """
    if seed is None:
        return
    if isinstance(seed, Tensor):
        check_dense(name, seed)
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"{name} must hold one int64, got {seed.dtype} of shape {list(seed.shape)}")
        if seed.device != device:
            raise InputError(f"{name} must be on {device}, got {seed.device}")
        return
    if type(seed) is not int and (isinstance(seed, bool) or not isinstance(seed, (numbers.Integral, torch.SymInt))):
        raise TypeError(f"{name} must be an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise InputError(f"{name} must be in [-2**63, 2**63), got {seed}")


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return a valid seed as an int64 scalar tensor on `device`.

    If `seed` is None, the seed is drawn from torch's generator of that device. It is drawn as a tensor because
    torch.compile and CUDA graphs would bake in a Python number.
    """
    if seed is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed.reshape(()) if seed.dim() else seed
    # Fill the tensor on the device. The host would wait for a copy, and a CUDA graph could not capture it.
    return torch.full((), seed, dtype=torch.int64, device=device)


def _random_mask_fake(
    backend: str, seed: Tensor, batch: int, heads: int, queries: int, keys: int, ratio: float, stream: int
) -> Tensor:
    return seed.new_empty((batch, heads, queries, keys), dtype=torch.bool)


def _random_mask(
    backend: str, seed: Tensor, batch: int, heads: int, queries: int, keys: int, ratio: float, stream: int
) -> Tensor:
    mask = _random_mask_fake(backend, seed, batch, heads, queries, keys, ratio, stream)
    _LAUNCH[backend](mask, seed, ratio_threshold(ratio), stream)
    return mask


register(
    "random_mask(str backend, Tensor seed, SymInt batch, SymInt heads, SymInt queries, SymInt keys, float ratio,"
    " SymInt stream) -> Tensor",
    _random_mask,
    _random_mask_fake,
)


def _launch_reference(mask: Tensor, seed: Tensor, threshold: int, stream: int) -> None:
    batch, heads, queries, keys = mask.shape
    drawn = reference.random_mask(
        batch * heads, queries, keys, threshold=threshold, seed=seed, stream=stream, device=seed.device
    )
    mask.copy_(drawn.view(mask.shape))


def _launch_cpu(mask: Tensor, seed: Tensor, threshold: int, stream: int) -> None:
    batch, heads, queries, keys = mask.shape
    _core.load().random_mask(
        mask.data_ptr(), batch * heads, queries, keys, seed.item(), stream, threshold, _core.threads()
    )


def _launch_triton(mask: Tensor, seed: Tensor, threshold: int, stream: int) -> None:
    from sgalign.kernels import random_mask as kernels

    with _cuda.on(seed.device):
        kernels.random_mask(mask, seed, threshold, stream)


def _launch_cuda(mask: Tensor, seed: Tensor, threshold: int, stream: int) -> None:
    batch, heads, queries, keys = mask.shape
    core = _cuda.core(seed.device)
    with _cuda.on(seed.device):
        core.cuda_random_mask(
            mask.data_ptr(),
            batch * heads,
            queries,
            keys,
            seed.data_ptr(),
            stream,
            threshold,
            _cuda.current_stream(seed.device),
        )


# Each function writes into a contiguous mask.
_LAUNCH: dict[str, Callable[[Tensor, Tensor, int, int], None]] = {
    "reference": _launch_reference,
    "cpu": _launch_cpu,
    "triton": _launch_triton,
    "cuda": _launch_cuda,
}
