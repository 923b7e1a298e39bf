"""The checks of attention's arguments, and the form in which they reach the operation."""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import backends
from sgalign.ops._autograd import is_plain
from sgalign.ops._operands import (
    Tensors,
    cast,
    check_bool,
    check_device,
    check_dtype,
    check_floating,
    check_tensor,
    computed_dtype,
    differs,
    once_a_signature,
)
from sgalign.ops.random_mask import STEPS, check_seed, check_stream, checked_ratio, ratio_threshold, seed_tensor

MAX_DIM = 256  # channels per head
MAX_SCALE = torch.finfo(torch.float32).max / 2  # half the largest number, because the kernels multiply it by log2(e)


class Options(NamedTuple):
    """The options of a call in the order of `OPTIONS_SCHEMA`: all arguments except queries, keys and values."""

    mask: Tensor | None  # bool, broadcastable to [B, H, Lq, Lk]
    key_padding_mask: Tensor | None
    seed: Tensor | None  # None if nothing is drawn
    mask_ratio: float  # drop probability of the random mask
    dropout_p: float  # drop probability of dropout
    stream: int  # stream of the random mask
    scale: float | None  # factor of the scores. If None, the default for the number of channels

    @property
    def mask_threshold(self) -> int:
        """The drop probability of the random mask times 65536."""
        return ratio_threshold(self.mask_ratio)

    @property
    def dropout_threshold(self) -> int:
        """The drop probability of dropout times 65536."""
        return ratio_threshold(self.dropout_p)

    @property
    def dropout_scale(self) -> float:
        """The factor of the weights that dropout keeps."""
        return STEPS / (STEPS - self.dropout_threshold) if self.dropout_threshold < STEPS else 0.0


# Part of the schemas of the registered operations. Ratios and scale are float, so they are constants in compiled code.
# With SymInt or Scalar, compiled code could use an old ratio if it also multiplies a tensor by the same float.
OPTIONS_SCHEMA = (
    "Tensor? mask, Tensor? key_padding_mask, Tensor? seed, float mask_ratio, float dropout_p,"
    " SymInt stream, float? scale"
)


class Prepared(NamedTuple):
    """The checked arguments of a call. The tensors have the dtype of the computation."""

    plain: bool  # the result of `is_plain`
    backend: str
    queries: Tensors
    key: Tensor
    value: Tensor
    options: Options


def prepare(
    queries: Tensors,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_ratio: float,
    mask_seed: int | Tensor | None,
    mask_stream: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    backend: str | None,
) -> Prepared:
    """Check the arguments of a public function and return them as the operation takes them.

    Raises:
        TypeError, ValueError, ImportError: as in `fused_masked_attention`.
    """
    plain = is_plain(*queries, key, value, mask, key_padding_mask, mask_seed)
    _check(plain, key, value, mask, key_padding_mask, *queries)
    query = queries[0]
    mask_ratio, dropout_p = checked_ratio(mask_ratio, "mask_ratio"), checked_ratio(dropout_p, "dropout_p")
    check_stream(mask_stream, "mask_stream")
    check_seed(mask_seed, query.device, "mask_seed")
    scale = _checked_scale(scale)
    dtype = computed_dtype(query)
    backend = backends.choose(backend, query.device, dtype)
    queries, key, value = [cast(query, dtype) for query in queries], cast(key, dtype), cast(value, dtype)
    draws = ratio_threshold(mask_ratio) or ratio_threshold(dropout_p)
    seed = seed_tensor(mask_seed, query.device) if draws else None
    options = Options(mask, key_padding_mask, seed, mask_ratio, dropout_p, mask_stream, scale)
    return Prepared(plain, backend, queries, key, value, options)


@once_a_signature
def _check(key: Tensor, value: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, *queries: Tensor) -> None:
    _check_rows(dict(zip(("query", "mirrored_query"), queries)) | {"key": key, "value": value})
    _check_masks(mask, key_padding_mask, queries[0], key.shape[2])


def _check_rows(rows: dict[str, Any]) -> None:
    for name, tensor in rows.items():
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise InputError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions: {list(tensor.shape)}")
        check_floating(name, tensor)
    query, key = rows["query"], rows["key"]
    batch, heads, _, dim = query.shape
    for name, tensor in list(rows.items())[1:]:
        expected = query.shape if name == "mirrored_query" else (batch, heads, key.shape[2], dim)
        if differs(tensor.shape, expected):
            raise InputError(
                f"{name} must be {list(expected)} to match query {list(query.shape)}"
                f"{' and key ' + str(list(key.shape)) if name == 'value' else ''}, got {list(tensor.shape)}"
            )
        check_device(name, tensor, query.device, "the query's device")
        check_dtype(name, tensor, query, "the query's dtype")
    if dim > MAX_DIM:
        raise InputError(f"query must have at most {MAX_DIM} channels per head (D), got {dim}")


def _check_masks(mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, keys: int) -> None:
    batch, heads, length, _ = query.shape
    for name, boolean in (("mask", mask), ("key_padding_mask", key_padding_mask)):
        if boolean is not None:
            check_bool(name, boolean)
            check_device(name, boolean, query.device, "the query's device")
    shape = batch, heads, length, keys
    if mask is not None:
        fits = mask.dim() <= 4 and all(size in (full, 1) for size, full in zip(mask.shape[::-1], shape[::-1]))
        if not fits:
            raise InputError(f"mask must be broadcastable to {list(shape)}, got {list(mask.shape)}")
    if key_padding_mask is not None and differs(key_padding_mask.shape, (batch, keys)):
        raise InputError(f"key_padding_mask must be of shape {[batch, keys]}, got {list(key_padding_mask.shape)}")


def scale_for(dim: int, scale: float | None) -> float:
    """Return the factor of the scores for queries with `dim` channels. `scale` is the given factor or None."""
    if scale is not None:
        return scale
    return 1 / math.sqrt(dim) if dim else 1.0


def _checked_scale(scale: float | None) -> float | None:
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # also catches NaN
        raise InputError(f"scale must be finite and at most {MAX_SCALE:.2g} in absolute value, got {scale}")
    return float(scale) if isinstance(scale, numbers.Real) else scale
