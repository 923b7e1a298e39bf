"""The dtype of boxes, scores and losses, which must not be rounded to bfloat16 or float16."""

from __future__ import annotations

from torch import Tensor

from sgalign.ops._operands import accumulated_dtype, cast


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or as it is if it has float64."""
    return cast(tensor, accumulated_dtype(tensor.dtype))
