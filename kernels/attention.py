"""The functions that launch the Triton kernels for masked attention, on one branch or on both.

The kernels are in attention_forward.py and attention_backward.py. They share the functions of attention_tiles.py. If
there are two outputs, the second belongs to the mirrored branch (the mirror), and only this branch has the random mask.
Both branches may share one query. A program iterates over the keys. To compute the gradients of keys and values, it
iterates over the queries instead.

Scores and log-sum-exps are for powers of 2 instead of e, so the kernels receive `scale` times log2(e). They need a
positive scale. If it is negative, the scale and the queries are multiplied by -1 before the launch. If it is 0, the
queries are multiplied by 0 and the scale is 1.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.kernels.attention_backward import add_kernel, key_value_gradient_kernel, query_gradient_kernel
from sgalign.kernels.attention_forward import forward_kernel, merge_kernel
from sgalign.kernels.configs import Config, config, dot_precision

Matrix = tuple[Tensor, int, int, int, int] | None  # a tensor and its batch, head, row and column strides

TINY = torch.finfo(torch.float32).tiny
LN_2 = math.log(2)
# These two numbers agree with the times measured on an H200 for different splits (benchmarks/results/nvidia-h200).
MERGE_SCORES = 53000  # the number of scores that a multiprocessor computes in the time of the merging launch
RESIDENT_WARPS = 8  # warps that a multiprocessor holds at once, with up to 255 registers per thread


def forward(
    queries: list[Tensor],
    key: Tensor,
    value: Tensor,
    outs: list[Tensor],
    logsumexps: list[Tensor],
    options: Any,
    multiprocessors: int,
) -> None:
    """Write the output ``[B, H, Lq, D]`` and the log-sum-exp ``[B, H, Lq]`` of each branch.

    Args:
        queries, key, value, outs: the tensors of one or two branches, with last strides of 1.
        logsumexps: the log-sum-exps of one or two branches, float32, with logarithms to base 2.
        options: the masks, seed, thresholds, stream and scale (`sgalign.ops._attention_backends.Options`).
        multiprocessors: the number of multiprocessors of the GPU, which decides how many programs are launched.
    """
    if not outs[0].numel():
        return
    queries, scale, _ = _positive_scale(queries, options.scale)
    launch = _launch("forward", queries[0], key, len(outs), options, multiprocessors)
    heads, length = queries[0].shape[1:3]
    targets, target_sums = outs, logsumexps
    if launch.splits > 1:
        targets = _parts(outs, launch.splits)
        target_sums = _parts(logsumexps, launch.splits)
    forward_kernel[launch.grid](
        *_matrices(queries), _matrix(key), _matrix(value), *_matrices(targets), *_both(target_sums), *_masks(options),
        launch.batch_heads, heads, length, key.shape[2], launch.tiles, launch.span, *_numbers(options, scale),
        **launch.constants,
    )  # fmt: skip
    if launch.splits > 1:
        merge_kernel[launch.merge_grid](
            *_both(targets), *_both(target_sums), *_matrices(outs), *_both(logsumexps),
            launch.batch_heads, heads, length, launch.splits, **launch.merge_constants,
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
    """Write `grads`: the gradients of the queries, of the key and of the value.

    Args:
        grad_outs, grads: the gradients of the outputs and of the inputs, with last strides of 1.
        queries, key, value, outs, logsumexps, options, multiprocessors: as in `forward`.
    """
    *grad_queries, grad_key, grad_value = grads
    if not outs[0].numel():
        grad_key.zero_()
        grad_value.zero_()
        return
    queries, scale, sign = _positive_scale(queries, options.scale)
    heads, length = queries[0].shape[1:3]
    deltas = _both([torch.empty_like(logsumexp) for logsumexp in logsumexps])
    sums, masks, numbers = _both(logsumexps), _masks(options), _numbers(options, scale)
    of_queries, of_key, of_value, of_grads = _matrices(queries), _matrix(key), _matrix(value), _matrices(grad_outs)

    launch = _launch("query_gradient", queries[0], key, len(outs), options, multiprocessors)
    targets = grad_queries
    if launch.splits > 1:
        targets = _parts(grad_queries, launch.splits)
    query_gradient_kernel[launch.grid](
        *of_queries, of_key, of_value, *_matrices(outs), *sums, *of_grads, *deltas, *_matrices(targets), *masks,
        launch.batch_heads, heads, length, key.shape[2], launch.tiles, launch.span, *numbers, scale * sign,
        **launch.constants,
    )  # fmt: skip
    if launch.splits > 1:
        add_kernel[launch.merge_grid[0], len(grad_queries)](
            *_both(targets), *_matrices(grad_queries), launch.batch_heads, heads, length, launch.splits,
            **launch.merge_constants,
        )  # fmt: skip

    launch = _launch("key_value_gradient", queries[0], key, len(outs), options, multiprocessors)
    if launch.tiles:
        key_value_gradient_kernel[launch.grid](
            *of_queries, of_key, of_value, *sums, *of_grads, *deltas, _matrix(grad_key), _matrix(grad_value), *masks,
            heads, length, key.shape[2], launch.tiles, *numbers, scale, **launch.constants,
        )  # fmt: skip


class Tiling(NamedTuple):
    """The division of the keys into tiles of `groups` strips of `columns` keys each."""

    groups: int
    columns: int
    count: int  # number of tiles
    whole: bool  # True if no tile has unused columns

    @staticmethod
    def of(plan: Config, drawn: bool, keys: int) -> "Tiling":
        """Return the best tiling for a number of keys.

        If nothing is drawn, a tile has one strip of neighboring keys. Otherwise the number of strips is the one that
        needs the least work. A Philox call takes about twice as many instructions as everything else that a score
        needs.
        """
        if not drawn:
            return Tiling(1, plan.block_k, _ceil(keys, plan.block_k), keys % plan.block_k == 0)

        def tiling(groups: int) -> Tiling:
            columns = min(plan.block_k // groups, 32)
            whole, rest = divmod(keys, 32 * groups)
            return Tiling(groups, columns, whole * (32 // columns) + _ceil(min(rest, 32), columns), not rest)

        # In a matrix product's result, a row of threads holds 8 columns, so a strip needs at least 8 columns.
        sizes = (groups for groups in (8, 4, 2, 1) if groups == 1 or plan.block_k >= 8 * groups)
        return min(map(tiling, sizes), key=lambda t: t.count * t.columns * (t.groups + 2))


class Launch(NamedTuple):
    """The launch parameters of a kernel for one shape, and those of the kernel that merges its splits."""

    grid: tuple[int, ...]
    batch_heads: int
    tiles: int
    span: int  # tiles per program
    splits: int  # number of programs that share one block of queries
    constants: dict[str, Any]
    merge_grid: tuple[int, int]
    merge_constants: dict[str, int]


def _launch(kernel: str, query: Tensor, key: Tensor, branches: int, options: Any, multiprocessors: int) -> Launch:
    """Return the launch parameters of a kernel for these tensors and options."""
    masked, dropout = options.mask_threshold > 0, options.dropout_threshold > 0
    bounded = options.mask is not None or options.key_padding_mask is not None
    plan = config(kernel, key, branches, dropout)
    return launch_for(kernel, plan, (*query.shape, key.shape[2]), branches, masked, dropout, bounded, multiprocessors)


@functools.lru_cache(4096)  # saves tens of microseconds per call
def launch_for(
    kernel: str,
    plan: Config,
    shape: tuple[int, ...],
    branches: int,
    masked: bool,
    dropout: bool,
    bounded: bool,
    multiprocessors: int,
) -> Launch:
    """Return the launch parameters of a kernel.

    `shape` is (B, H, Lq, D, Lk). `bounded` is True if an explicit mask or a padding mask is given.
    """
    batch, heads, queries, dim, keys = shape
    tiling = Tiling.of(plan, masked or dropout, keys)
    compiled_for = constants(kernel, plan, tiling, branches, masked, dropout, dim, bounded)
    blocks, span, splits = batch * heads * _ceil(queries, plan.block_q), tiling.count, 1
    if kernel == "key_value_gradient":
        grid: tuple[int, ...] = (batch * heads * tiling.count,)
    else:
        span, splits = key_splits(plan, branches, blocks, tiling.count, multiprocessors)
        grid = blocks, splits
    block_q = max(16, 2048 // _padded(dim))
    merge_grid = batch * heads * _ceil(queries, block_q), branches
    merge_constants = {"DIM": dim, "BLOCK_D": _padded(dim), "BLOCK_Q": block_q}
    return Launch(grid, batch * heads, tiling.count, span, splits, compiled_for, merge_grid, merge_constants)


def key_splits(plan: Config, branches: int, blocks: int, tiles: int, multiprocessors: int) -> tuple[int, int]:
    """Return the tiles per program and the number of programs per block of queries, chosen for the least time.

    A program takes one step per tile and about one more for its queries. The programs that the GPU runs at the same
    time form a round. A round with fewer programs takes just as long, so the time is counted in whole rounds.
    Every program gets at least two tiles, because a program with a single tile would spend most of its time on setup
    and output.
    """
    resident = max(RESIDENT_WARPS // plan.warps, 1)
    merging = MERGE_SCORES / (plan.block_q * plan.block_k * branches)

    def steps(splits: int) -> float:
        rounds = _ceil(blocks * splits, multiprocessors * resident)
        return rounds * resident * (_ceil(tiles, splits) + 1) + (merging if splits > 1 else 0)

    most = min(tiles // 2, multiprocessors * resident)  # one block gets no more programs than the GPU runs at once
    splits = min(range(1, max(most, 1) + 1), key=steps)
    if steps(splits) > 0.95 * steps(1):  # saves too little time for the memory that it needs
        splits = 1
    span = _ceil(tiles, splits)
    return span, _ceil(tiles, span) if tiles else 1


def constants(
    kernel: str, plan: Config, tiling: Tiling, branches: int, masked: bool, dropout: bool, dim: int, bounded: bool
) -> dict[str, Any]:
    """Return the compile-time constants and launch options of a kernel.

    `bounded` is True if an explicit mask or a padding mask is given.
    """
    of_kernel: dict[str, Any] = {} if kernel == "key_value_gradient" else {"BOUNDED": bounded or not tiling.whole}
    if plan.registers:
        of_kernel["maxnreg"] = plan.registers
    return {
        "BRANCHES": branches,
        "MASKED": masked,
        "DROPOUT": dropout,
        "DIM": dim,
        "BLOCK_D": _padded(dim),
        "BLOCK_Q": plan.block_q,
        "GROUPS": tiling.groups,
        "COLUMNS": tiling.columns,
        "PRECISION": dot_precision(),
        **of_kernel,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }


def _positive_scale(queries: list[Tensor], scale: float) -> tuple[list[Tensor], float, float]:
    """Move the sign of the scale into the queries, and return the queries, the positive scale and the sign.

    The kernels need a positive scale because they take the score of the largest product as the largest score. The sign
    is -1, 0 or 1. If the absolute value of the scale is below the smallest normal float32 number, the sign is 0 and the
    positive scale is 1.
    """
    if scale >= TINY:
        return queries, scale, 1.0
    sign = -1.0 if scale <= -TINY else 0.0
    return [query * sign for query in queries], -scale if sign else 1.0, sign


def _parts(tensors: list[Tensor], splits: int) -> list[Tensor]:
    """Return one uninitialized float32 tensor `[splits, B, H, Lq, ...]` per tensor, for the results of all splits."""
    return [tensor.new_empty(splits, *tensor.shape, dtype=torch.float32) for tensor in tensors]


def _both(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the tensors of both branches. The second is None if there is only one branch."""
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def _matrices(tensors: list[Tensor]) -> tuple[Matrix, Matrix]:
    return _matrix(tensors[0]), _matrix(tensors[1]) if len(tensors) == 2 else None


def _matrix(tensor: Tensor) -> Matrix:
    """Return a tensor and the strides of its last four dimensions, in the form that the kernels accept."""
    return (tensor, *tensor.stride()[-4:])  # type: ignore[return-value]


def _masks(options: Any) -> tuple[Any, ...]:
    """Return the masks and the seed.

    The row of a padding mask `[B, Lk]` is the same for all heads and queries.
    """
    mask, padding = options.mask, options.key_padding_mask
    if mask is not None:
        mask = _matrix(mask)
    if padding is not None:
        padding = padding, padding.stride(0), 0, 0, padding.stride(1)
    return mask, padding, options.seed


def _numbers(options: Any, scale: float) -> tuple[Any, ...]:
    thresholds = options.mask_threshold, options.dropout_threshold
    return options.stream, *thresholds, scale / LN_2, options.dropout_scale


def _padded(dim: int) -> int:
    """Return the padded number of channels of a block, a power of two that the matrix units support."""
    return max(16, 1 << (dim - 1).bit_length())


def _ceil(count: int, size: int) -> int:
    """Return `count / size` rounded up, without `triton.cdiv`, which takes microseconds."""
    return -(-count // size)
