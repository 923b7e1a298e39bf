"""The alignment loss in Triton: one pass computes the loss of each relation and the gradient of the sum.

The algorithm is that of csrc/cpu/alignment.cpp, but a row is held in registers instead of scratch memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Elements per program. There are 4 per thread, so the values of a row fit in registers. Rows longer than this get more
# warps.
ELEMENTS = 1024


@triton.jit
def divergence(p, log_p, log_q):
    """Return the term of each class in KL(p || q).

    It is 0 if p is 0, and infinite if only q is 0, even if p was rounded to 0.
    """
    ratio = log_p - log_q
    return tl.where(ratio == float("inf"), ratio, tl.where(p == 0, 0.0, p * ratio))


@triton.jit
def log_softmax(x):
    """Return the logarithm of the softmax over the classes.

    The maximum is subtracted first. This removes the common part of large logits without a rounding error.
    """
    shifted = x - tl.max(x, 1)[:, None]
    return shifted - tl.log(tl.sum(tl.exp(shifted), 1))[:, None]


@triton.jit
def bernoulli(x):
    """Return the probabilities of yes and no, and their logarithms."""
    below = tl.where(x < 0, x, 0.0)
    above = tl.where(x > 0, x, 0.0)
    u = tl.exp(below - above)
    # For u in [0, 1], log(1 + u) = 2 atanh(u / (2 + u)), a series of positive terms with a ratio of at most 1/9.
    f = u / (u + 2)
    tail = tl.full(x.shape, 1 / 15, tl.float32)
    for i in tl.static_range(7):
        tail = tail * (f * f) + 1 / (13 - 2 * i)
    tail = 2 * f * tail
    likely = 1 / (u + 1)
    unlikely = u / (u + 1)
    nan = tl.where(x != x, x, 0.0)  # restores a NaN, which the comparisons above lose
    p = tl.where(x < 0, unlikely, likely) + nan
    q = tl.where(x < 0, likely, unlikely) + nan
    return p, q, below - tail + nan, nan - above - tail


@triton.jit(do_not_specialize=["relations", "scale"])
def alignment_kernel(
    losses, grad, mirrored, mirrored_stride, logits, logits_stride, weight, relations, classes, scale,
    SIGMOID: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the divergence and its gradient for a block of relations.

    The divergence is KL(teacher || student). If SYMMETRIC, it is the mean of KL(teacher || student) and KL(student ||
    teacher). The kernel is memory-bound. It reads two numbers and writes one for each class of each relation.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = row < relations
    k = tl.arange(0, BLOCK_K)
    inside = present[:, None] & (k < classes)[None, :]
    row = row.to(tl.int64)
    # For a softmax, the padding is -inf, which has no weight. For a sigmoid, it is 0 in teacher and student, so it adds
    # no divergence.
    padding = tl.where(present[:, None] & (k >= classes)[None, :] & (not SIGMOID), -float("inf"), 0.0)
    x = tl.load(logits + row[:, None] * logits_stride + k[None, :], mask=inside, other=0.0).to(tl.float32) + padding
    y = tl.load(mirrored + row[:, None] * mirrored_stride + k[None, :], mask=inside, other=0.0).to(tl.float32) + padding
    factor = tl.full([ROWS], 1.0, tl.float32) * scale
    if weight is not None:
        factor *= tl.load(weight + row, mask=present, other=0.0)

    if SIGMOID:
        t, not_t, log_t, log_not_t = bernoulli(x)
        s, not_s, log_s, log_not_s = bernoulli(y)
        loss = tl.sum(divergence(t, log_t, log_s) + divergence(not_t, log_not_t, log_not_s), 1)
        gradient = s - t
        if SYMMETRIC:
            loss += tl.sum(divergence(s, log_s, log_t) + divergence(not_s, log_not_s, log_not_t), 1)
            spread = s * not_s
            gradient += tl.where(spread == 0, 0.0, spread * (y - x))
    else:
        log_t = log_softmax(x)
        log_s = log_softmax(y)
        t = tl.exp(log_t)
        s = tl.exp(log_s)
        loss = tl.sum(divergence(t, log_t, log_s), 1)
        gradient = s - t
        if SYMMETRIC:
            back = divergence(s, log_s, log_t)
            total = tl.sum(back, 1)
            loss += total
            gradient += back - s * total[:, None]
    if SYMMETRIC:
        factor *= 0.5
    # A relation of weight 0 contributes 0, even if its divergence is infinite.
    tl.store(losses + row, tl.where(factor == 0, 0.0, factor * loss), mask=present)
    gradient = tl.where(factor[:, None] == 0, 0.0, gradient * factor[:, None])
    tl.store(grad + row[:, None] * classes + k[None, :], gradient, mask=inside)


def loss(
    mirrored: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    scale: float,
    sigmoid: bool,
    symmetric: bool,
    losses: Tensor,
    grad: Tensor,
) -> None:
    """Write each relation's share of the loss to `losses`, and the gradient of the sum of shares to `grad`.

    The gradient is taken with respect to `mirrored`. All last strides are 1.
    """
    relations, classes = mirrored.shape
    if not relations:
        return
    rows, width, warps = sizes(classes)
    alignment_kernel[(triton.cdiv(relations, rows),)](
        losses, grad, mirrored, mirrored.stride(0), logits, logits.stride(0), weight, relations, classes, scale,
        SIGMOID=sigmoid, SYMMETRIC=symmetric, ROWS=rows, BLOCK_K=width, num_warps=warps,
    )  # fmt: skip


def sizes(classes: int) -> tuple[int, int, int]:
    """Return the number of rows per program, their padded length and the number of warps."""
    width = triton.next_power_of_2(classes)
    return max(1, ELEMENTS // width), width, min(max(8 * width // ELEMENTS, 8), 32)
