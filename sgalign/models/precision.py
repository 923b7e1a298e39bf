"""Dtypes for boxes, scores and losses, which must not be rounded to bfloat16 or float16."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it has float64."""
    return tensor.to(at_least_float32(tensor.dtype))
