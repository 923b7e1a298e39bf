"""Masked attention in Triton, for one branch or both: which kernel is launched on what.

The kernels are in attention_forward.py and attention_backward.py, of the parts in attention_tiles.py. With two outputs
the second is the mirror's, which alone has the random mask; one query may serve both. A program walks over the keys, or
for the gradients of keys and values over the queries.

Scores and logsumexps are in units of log2, and `scale` is positive: it is multiplied by log2(e), and a negative one by
-1 with the query, before the kernels see it.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sgalign.kernels.attention_backward import key_value_gradient_kernel, query_gradient_kernel
from sgalign.kernels.attention_forward import forward_kernel, merge_kernel
from sgalign.kernels.attention_tiles import Matrix
from sgalign.kernels.configs import Config, config, dot_precision


def forward(
    queries: list[Tensor],
    key: Tensor,
    value: Tensor,
    outs: list[Tensor],
    logsumexps: list[Tensor],
    options: Any,
    multiprocessors: int,
) -> None:
    """Write each branch's output ``[B, H, Lq, D]`` and logsumexp ``[B, H, Lq]``, float32, in units of log2.

    Args:
        queries, key, value, outs, logsumexps: of one branch or two, with last strides of 1.
        options: masks, seed, thresholds, stream and scale, by these names (`sgalign.ops._attention_backends.Options`).
        multiprocessors: of the GPU, which is filled with programs.
    """
    if not outs[0].numel():
        return
    queries, scale, _ = _positive_scale(queries, options.scale)
    batch, heads, length, dim = queries[0].shape
    plan = config("forward", key, len(outs), options.dropout_threshold > 0)
    tiling = Tiling.of(plan, options.mask_threshold + options.dropout_threshold > 0, key.shape[2])
    blocks = batch * heads * triton.cdiv(length, plan.block_q)
    span, splits = _key_splits(blocks, tiling.count, multiprocessors)
    targets, target_sums = outs, logsumexps
    if splits > 1:
        targets = [out.new_empty(splits, *out.shape, dtype=torch.float32) for out in outs]
        target_sums = [out.new_empty(splits, *out.shape[:3], dtype=torch.float32) for out in outs]
    forward_kernel[(blocks, splits)](
        *_matrices(queries), _matrix(key), _matrix(value), *_matrices(targets), *_both(target_sums), *_masks(options),
        batch * heads, heads, length, key.shape[2], tiling.count, span, *_numbers(options, scale),
        **constants(plan, tiling, len(outs), options.mask_threshold, options.dropout_threshold, dim),
    )  # fmt: skip
    if splits > 1:
        block_q = max(16, 2048 // _padded(dim))
        for part, part_sums, out, logsumexp in zip(targets, target_sums, outs, logsumexps):
            merge_kernel[(batch * heads * triton.cdiv(length, block_q),)](
                part, part_sums, _matrix(out), logsumexp, batch * heads, heads, length, splits,
                DIM=dim, BLOCK_D=_padded(dim), BLOCK_Q=block_q,
            )  # fmt: skip


def backward(
    grad_outs: list[Tensor],
    grads: list[Tensor],
    queries: list[Tensor],
    key: Tensor,
    value: Tensor,
    outs: list[Tensor],
    logsumexps: list[Tensor],
    options: Any,
    multiprocessors: int,
) -> None:
    """Write `grads`: of the queries, of key and of value.

    Args:
        grad_outs, grads: with last strides of 1.
        queries, key, value, outs, logsumexps, options, multiprocessors: as in `forward`.
    """
    *grad_queries, grad_key, grad_value = grads
    if not outs[0].numel():
        grad_key.zero_()
        grad_value.zero_()
        return
    queries, scale, sign = _positive_scale(queries, options.scale)
    batch, heads, length, dim = queries[0].shape
    branches, dropout = len(outs), options.dropout_threshold > 0
    drawn = dropout or options.mask_threshold > 0
    compiled_for = options.mask_threshold, options.dropout_threshold, dim
    deltas = [torch.empty_like(logsumexp) for logsumexp in logsumexps]

    plan = config("query_gradient", key, branches, dropout)
    tiling = Tiling.of(plan, drawn, key.shape[2])
    blocks = batch * heads * triton.cdiv(length, plan.block_q)
    span, splits = _key_splits(blocks, tiling.count, multiprocessors)
    targets = grad_queries
    if splits > 1:
        targets = [grad.new_empty(splits, *grad.shape, dtype=torch.float32) for grad in grad_queries]
    query_gradient_kernel[(blocks, splits)](
        *_matrices(queries), _matrix(key), _matrix(value), *_matrices(outs), *_both(logsumexps), *_matrices(grad_outs),
        *_both(deltas), *_matrices(targets), *_masks(options), batch * heads, heads, length, key.shape[2], tiling.count,
        span, *_numbers(options, scale), **constants(plan, tiling, branches, *compiled_for),
    )  # fmt: skip
    for grad, target in zip(grad_queries, targets):
        if splits > 1:
            grad.copy_(target.sum(0))
        if sign != 1:
            grad.mul_(sign)

    plan = config("key_value_gradient", key, branches, dropout)
    tiling = Tiling.of(plan, drawn, key.shape[2])
    if tiling.count:
        key_value_gradient_kernel[(batch * heads * tiling.count,)](
            *_matrices(queries), _matrix(key), _matrix(value), *_both(logsumexps), *_matrices(grad_outs),
            *_both(deltas), _matrix(grad_key), _matrix(grad_value), *_masks(options), heads, length, key.shape[2],
            tiling.count, *_numbers(options, scale), **constants(plan, tiling, branches, *compiled_for),
        )  # fmt: skip


class Tiling(NamedTuple):
    """How keys are cut into tiles of `groups` strips of `columns` keys, and into how many."""

    groups: int
    columns: int
    count: int

    @staticmethod
    def of(plan: Config, drawn: bool, keys: int) -> "Tiling":
        """Neighbouring keys where nothing is drawn; else as many strips as make the work least.

        A Philox call takes about twice the instructions of all else that is done for a score.
        """
        if not drawn:
            return Tiling(1, plan.block_k, triton.cdiv(keys, plan.block_k))

        def tiling(groups: int) -> Tiling:
            columns = min(plan.block_k // groups, 32)
            whole, rest = divmod(keys, 32 * groups)
            return Tiling(groups, columns, whole * (32 // columns) + triton.cdiv(min(rest, 32), columns))

        # The matrix units' result has 8 columns in a row of threads.
        sizes = (groups for groups in (8, 4, 2, 1) if groups == 1 or plan.block_k >= 8 * groups)
        return min(map(tiling, sizes), key=lambda t: t.count * t.columns * (t.groups + 2))


def _key_splits(blocks: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Return the tiles of a program, and how many programs share one block of queries: enough to fill the device."""
    splits = min(max(tiles, 1), max(1, 2 * multiprocessors // blocks))
    span = triton.cdiv(tiles, splits)
    return span, triton.cdiv(tiles, span) if tiles else 1


def constants(
    plan: Config, tiling: Tiling, branches: int, mask_threshold: int, dropout_threshold: int, dim: int
) -> dict[str, Any]:
    """Return what a kernel is compiled for."""
    return {
        "BRANCHES": branches,
        "MASKED": mask_threshold > 0,
        "DROPOUT": dropout_threshold > 0,
        "DIM": dim,
        "BLOCK_D": _padded(dim),
        "BLOCK_Q": plan.block_q,
        "GROUPS": tiling.groups,
        "COLUMNS": tiling.columns,
        "PRECISION": dot_precision(),
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }


def _positive_scale(queries: list[Tensor], scale: float) -> tuple[list[Tensor], float, float]:
    """Return queries and a positive scale, and the sign that went from the scale into the queries: -1, 0 or 1.

    The kernels take the largest product for the largest score. A scale that is 0 in float32 has the sign 0.
    """
    sign = math.copysign(1, scale) if abs(scale) >= torch.finfo(torch.float32).tiny else 0.0
    if sign > 0:
        return queries, scale, sign
    return [query * sign for query in queries], -scale if sign else 1.0, sign


def _both(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the branch's and the mirror's tensor, None where there is none."""
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def _matrices(tensors: list[Tensor]) -> list[Matrix | None]:
    return [_matrix(tensor) for tensor in _both(tensors)]


def _matrix(tensor: Tensor | None) -> Matrix | None:
    """Return a tensor as the kernels take it, by its last four dimensions.

    A padding mask `[B, Lk]` has the same row for all heads and queries.
    """
    if tensor is None:
        return None
    if tensor.dim() == 2:
        return Matrix(tensor, tensor.stride(0), 0, 0, tensor.stride(1))
    return Matrix(tensor, *tensor.stride()[-4:])


def _masks(options: Any) -> tuple[Any, ...]:
    return _matrix(options.mask), _matrix(options.key_padding_mask), options.seed


def _numbers(options: Any, scale: float) -> tuple[Any, ...]:
    thresholds = options.mask_threshold, options.dropout_threshold
    return options.stream, *thresholds, scale * math.log2(math.e), options.dropout_scale


def _padded(dim: int) -> int:
    """Return the channels of a block: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(dim))
