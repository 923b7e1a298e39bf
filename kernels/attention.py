"""Masked attention in Triton, for one branch or both: forward, gradient of queries, gradients of keys and values.

A program holds a block of queries (for the gradients of keys and values, a tile of keys) and walks over the other side.
Where something is drawn, a tile of keys is `GROUPS` strips of `COLUMNS` keys that lie 32 apart, so that one Philox call
for a row and a column decides `GROUPS` keys (`sgalign.ops.reference.random_mask` has the definition). With `BRANCHES`
of 2 the second is the mirror, which alone has the random mask; `mirrored_query` is None where one query serves both.

Scores and log sums are in units of log2, and `scale` is positive: it is multiplied by log2(e), and a negative one by -1
with the query, before the kernels see it.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgalign.kernels.configs import Config, config, dot_precision
from sgalign.ops._cuda import multiprocessors
from sgalign.ops.random_mask import dropout_scale

NOT_SPECIALIZED = ["batch_heads", "queries", "keys", "tiles", "span", "stream", "mask_threshold", "dropout_threshold"]
# With one query for both branches, the mirror's exponentials are the supervised ones times a factor. Its own maximum
# may lie this far below the other one before they lose digits; blocks where it lies lower are done again.
SHARED_RANGE = tl.constexpr(16.0)
WIDEST = tl.constexpr(16)  # float32 channels of a row that `products` holds at once
DROPOUT_BIT = tl.constexpr(0x80000000)  # of the stream: reference.DROPOUT_STREAM_BIT


class Matrix(NamedTuple):
    """A `[B, H, rows, columns]` tensor as the kernels take it; strides count elements."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Rows(NamedTuple):
    """Some rows of one `[B, H]` of a `Matrix`, and where they are from."""

    block: Any  # [rows, BLOCK_D]; tuples of Triton have `values` already
    matrix: Any
    batch: Any
    head: Any
    row: Any
    inside: Any


class Draws(NamedTuple):
    """What the random numbers of a program are a function of, and what is dropped without them."""

    mask: Any
    padding: Any
    seed: Any
    stream: Any
    mask_threshold: Any
    dropout_threshold: Any
    batch: Any
    head: Any
    batch_head: Any


# ------------------------------------------------------------------------------------------------------ tiles


@triton.jit
def load(matrix, batch, head, row, column, inside, other):
    """Elements at `row` and `column`, which broadcast; `other` where not `inside`."""
    start = matrix.data + batch.to(tl.int64) * matrix.batch + head.to(tl.int64) * matrix.head
    place = row.to(tl.int64) * matrix.row + column.to(tl.int64) * matrix.column
    return tl.load(start + place, mask=inside, other=other)


@triton.jit
def load_rows(matrix, batch, head, row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[rows, BLOCK_D]`; zeros beyond the channels and for rows that are not `inside`: what they hold must not leak."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    values = load(matrix, batch, head, row[:, None], channel, inside[:, None] & (channel < DIM), 0.0)
    return Rows(values, matrix, batch, head, row, inside)


@triton.jit
def products(rows, others, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """`[rows, others]`: the product of each row with each of the others, over all channels.

    The matrix units want all channels of a row in one thread's registers, float32 ones twice, as they take them in two
    parts. So each product loads `WIDEST` of those at a time anew, which the cache has.
    """
    if BLOCK_D <= WIDEST or rows.block.dtype != tl.float32:
        result = tl.dot(rows.block, tl.trans(others.block), input_precision=PRECISION)
    else:
        result = tl.zeros([rows.row.shape[0], others.row.shape[0]], tl.float32)
        for first in range(0, DIM, WIDEST):
            some, of_others = load_channels(rows, first, DIM), load_channels(others, first, DIM)
            result = tl.dot(some, tl.trans(of_others), result, input_precision=PRECISION)
    return result


@triton.jit
def add_weighted(total, weights, rows, PRECISION: tl.constexpr):
    """`total` with the sums of rows by each row of weights added."""
    return tl.dot(weights.to(rows.block.dtype), rows.block, total, input_precision=PRECISION)


@triton.jit
def load_channels(rows, first, DIM: tl.constexpr):
    channel = first + tl.arange(0, WIDEST)[None, :]
    inside = rows.inside[:, None] & (channel < DIM)
    return load(rows.matrix, rows.batch, rows.head, rows.row[:, None], channel, inside, 0.0)


@triton.jit
def store_rows(matrix, batch, head, row, inside, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)[None, :]
    start = matrix.data + batch.to(tl.int64) * matrix.batch + head.to(tl.int64) * matrix.head
    target = start + row.to(tl.int64)[:, None] * matrix.row + channel
    tl.store(target, values.to(matrix.data.dtype.element_ty), mask=inside[:, None] & (channel < DIM))


@triton.jit
def first_key(tile, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    if GROUPS == 1:
        return tile * COLUMNS
    return tile // (32 // COLUMNS) * (32 * GROUPS) + tile % (32 // COLUMNS) * COLUMNS


@triton.jit
def drawn(draws, stream, threshold, tile, query, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which entries of a tile draw a number below the threshold: `[BLOCK_Q, GROUPS * COLUMNS]`.

    Asked for in the layout of a matrix product's result, whose threads hold a column in all groups: each draws what it
    needs itself.
    """
    first = first_key(tile, GROUPS, COLUMNS)
    column = first // 256 * 32 + first % 32 + tl.arange(0, COLUMNS)
    word0, word1, word2, word3 = tl.philox(
        draws.seed,
        column.to(tl.uint32)[None, None, :],
        query.to(tl.uint32)[:, None, None],
        draws.batch_head.to(tl.uint32),
        stream.to(tl.uint32),
        n_rounds=7,
    )
    group = tl.arange(0, GROUPS)[None, :, None]
    if GROUPS < 8:
        group += first % 256 // 32
    word = tl.where(group < 4, tl.where(group < 2, word0, word1), tl.where(group < 6, word2, word3))
    number = tl.reshape(tl.where(group % 2 == 0, word << 16, word), [query.shape[0], GROUPS * COLUMNS])
    # A half is below the threshold where, moved to the upper half, it is at most this. 65536 wraps to all ones.
    return number <= (threshold.to(tl.uint32) << 16) - 1


@triton.jit
def load_tile(
    key, value, draws, tile, keys,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of keys and their values; `inside` are those that exist and are not padding."""
    place = tl.arange(0, GROUPS * COLUMNS)
    row = first_key(tile, GROUPS, COLUMNS) + place // COLUMNS * 32 + place % COLUMNS
    kept = row < keys
    if draws.padding is not None:
        kept = kept & (load(draws.padding, draws.batch, draws.head, row * 0, row, kept, 1) == 0)
    k = load_rows(key, draws.batch, draws.head, row, kept, DIM, BLOCK_D)
    return k, load_rows(value, draws.batch, draws.head, row, kept, DIM, BLOCK_D)


@triton.jit
def masks(
    draws, tile, query, queries, k, keys,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """0, or -inf for what both branches drop, broadcastable to `[BLOCK_Q, BLOCK_K]`; what the random mask drops; what
    dropout does."""
    bias = tl.where(k.inside, 0.0, -float("inf"))[None, :]
    if draws.mask is not None:
        inside = (query < queries)[:, None] & (k.row < keys)[None, :]
        explicit = load(draws.mask, draws.batch, draws.head, query[:, None], k.row[None, :], inside, 1)
        bias = tl.where(explicit != 0, -float("inf"), bias)
    random, noise = False, False
    if MASKED:
        random = drawn(draws, draws.stream, draws.mask_threshold, tile, query, GROUPS, COLUMNS)
    if DROPOUT:
        stream = draws.stream.to(tl.uint32) | DROPOUT_BIT
        noise = drawn(draws, stream, draws.dropout_threshold, tile, query, GROUPS, COLUMNS)
    return bias, random, noise


@triton.jit
def kept_scores(scores, bias, draws):
    """The scores that neither mask drops. Padding was loaded as 0; what the explicit mask drops may be NaN."""
    if draws.mask is not None:
        return tl.where(bias == 0, scores, -float("inf"))
    return scores + bias


@triton.jit
def mirrored(scores, random, MASKED: tl.constexpr):
    """The scores that the random mask leaves."""
    if MASKED:
        return tl.where(random, -float("inf"), scores)
    return scores


# ------------------------------------------------------------------------------------------------------ forward


@triton.jit
def nothing(BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """Weighted values, maximum and sum of exponentials of rows that have seen no key."""
    zeros = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    return zeros, tl.full([BLOCK_Q], -float("inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)


@triton.jit
def finite(top):
    """A maximum to subtract: where nothing is kept, subtracting 0 keeps the exponentials 0 instead of NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def add_values(weights, rescale, weighted, total, v, noise, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    total = total * rescale + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(noise, 0.0, weights)
    return add_weighted(weighted * rescale[:, None], weights, v, PRECISION), total


@triton.jit
def attend(scores, scale, state, v, noise, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """One tile further, by the online softmax. Dropped scores are -inf."""
    weighted, top, total = state
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = finite(new_top)
    weights = tl.exp2(scores * scale - shift[:, None])
    weighted, total = add_values(weights, tl.exp2(top - shift), weighted, total, v, noise, DROPOUT, PRECISION)
    return weighted, new_top, total


@triton.jit
def attend_both(
    scores, random, scale, state, mirrored_state, v, noise,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile further in both branches of one query, with one exponential for both."""
    weighted, top, total = state
    mirrored_weighted, mirrored_top, mirrored_total = mirrored_state
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    new_mirrored_top = new_top
    if MASKED:
        own = tl.max(mirrored(scores, random, MASKED), 1) * scale
        new_mirrored_top = tl.maximum(tl.maximum(mirrored_top, own), new_top - SHARED_RANGE)
    shift, mirrored_shift = finite(new_top), finite(new_mirrored_top)
    weights = tl.exp2(scores * scale - shift[:, None])
    mirrored_weights = weights
    if MASKED:
        mirrored_weights = tl.where(random, 0.0, weights * tl.exp2(shift - mirrored_shift)[:, None])
    weighted, total = add_values(weights, tl.exp2(top - shift), weighted, total, v, noise, DROPOUT, PRECISION)
    mirrored_weighted, mirrored_total = add_values(
        mirrored_weights, tl.exp2(mirrored_top - mirrored_shift), mirrored_weighted, mirrored_total, v, noise, DROPOUT,
        PRECISION,
    )  # fmt: skip
    return (weighted, new_top, total), (mirrored_weighted, new_mirrored_top, mirrored_total)


@triton.jit
def finish(
    out, log_sum, state, batch, head, batch_head, split, batch_heads, row, queries, dropout_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores a block's output and log sums, as part `split` of several, or as the whole."""
    weighted, top, total = state
    inside = row < queries
    divisor = tl.where(total == 0, 1.0, total)
    values = weighted * (dropout_scale / divisor)[:, None]
    part = split.to(tl.int64) * batch_heads
    target = Matrix(out.data + part * queries * DIM, out.batch, out.head, out.row, out.column)
    store_rows(target, batch, head, row, inside, values, DIM, BLOCK_D)
    # inf makes every weight of a row with nothing kept 0 in the backward pass.
    sums = tl.where(total == 0, float("inf"), top + tl.log2(divisor))
    tl.store(log_sum + (part + batch_head) * queries + row, sums, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    query, mirrored_query, key, value, out, mirrored_out, log_sum, mirrored_log_sum, mask, padding, seed,
    batch_heads, heads, queries, keys, tiles, span, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (batch * heads + head, block of queries; split): tiles of keys from `split * span` on, `span` of them."""
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head, split = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    seed_value = 0
    if MASKED or DROPOUT:
        seed_value = tl.load(seed)
    draws = Draws(mask, padding, seed_value, stream, mask_threshold, dropout_threshold, batch, head, batch_head)
    q = load_rows(query, batch, head, row, row < queries, DIM, BLOCK_D)
    if BRANCHES == 2 and not SHARED:
        mirrored_q = load_rows(mirrored_query, batch, head, row, row < queries, DIM, BLOCK_D)
    state = nothing(BLOCK_Q, BLOCK_D)
    mirrored_state = nothing(BLOCK_Q, BLOCK_D)
    begin = split * span
    end = tl.minimum(begin + span, tiles)
    for tile in range(begin, end):
        k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D)
        bias, random, noise = masks(draws, tile, row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws)
        if BRANCHES == 1:
            scores = mirrored(scores, random, MASKED)
        if SHARED:
            state, mirrored_state = attend_both(
                scores, random, scale, state, mirrored_state, v, noise, MASKED, DROPOUT, PRECISION
            )
        else:
            state = attend(scores, scale, state, v, noise, DROPOUT, PRECISION)
        if BRANCHES == 2 and not SHARED:
            scores = kept_scores(products(mirrored_q, k, DIM, BLOCK_D, PRECISION), bias, draws)
            scores = mirrored(scores, random, MASKED)
            mirrored_state = attend(scores, scale, mirrored_state, v, noise, DROPOUT, PRECISION)

    if SHARED and MASKED:
        # The sum holds the exponential of the maximum, 1, unless the maximum was taken too high for what is kept. Rows
        # of which the supervised branch keeps nothing have nothing to do again.
        if tl.min(tl.where(state[2] > 0, mirrored_state[2], 1.0)) < 0.5:
            mirrored_state = nothing(BLOCK_Q, BLOCK_D)
            for tile in range(begin, end):
                k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D)
                bias, random, noise = masks(draws, tile, row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS)
                scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws)
                scores = mirrored(scores, random, MASKED)
                mirrored_state = attend(scores, scale, mirrored_state, v, noise, DROPOUT, PRECISION)

    finish(out, log_sum, state, batch, head, batch_head, split, batch_heads, row, queries, dropout_scale, DIM, BLOCK_D)
    if BRANCHES == 2:
        finish(
            mirrored_out, mirrored_log_sum, mirrored_state, batch, head, batch_head, split, batch_heads, row, queries,
            dropout_scale, DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch_heads", "queries", "splits"])
def merge_kernel(
    parts, part_log_sums, out, log_sum, batch_heads, heads, queries, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Program (batch * heads + head, block of queries): the splits' outputs, weighted by their sums of exponentials."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head = tl.program_id(0) // blocks
    batch, head = batch_head // heads, batch_head % heads
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    weighted, top, total = nothing(BLOCK_Q, BLOCK_D)
    channel = tl.arange(0, BLOCK_D)[None, :]
    for split in range(splits):
        place = (split * batch_heads + batch_head).to(tl.int64) * queries + row
        sums = tl.load(part_log_sums + place, mask=row < queries, other=float("inf"))
        sums = tl.where(sums == float("inf"), -float("inf"), sums)
        inside = (row < queries)[:, None] & (channel < DIM)
        values = tl.load(parts + place[:, None] * DIM + channel, mask=inside, other=0.0)
        new_top = tl.maximum(top, sums)
        rescale, weight = tl.exp2(top - finite(new_top)), tl.exp2(sums - finite(new_top))
        weighted = weighted * rescale[:, None] + values * weight[:, None]
        total = total * rescale + weight
        top = new_top
    state = weighted, top, total
    finish(out, log_sum, state, batch, head, batch_head, batch_head * 0, batch_heads, row, queries, 1.0, DIM, BLOCK_D)


# ------------------------------------------------------------------------------------------------------ backward


@triton.jit
def grad_scores(scores, scale, log_sum, grad_weights, delta, noise, dropout_scale, DROPOUT: tl.constexpr):
    """Softmax weights, before dropout, and the gradient of the scores."""
    weights = tl.exp2(scores * scale - log_sum)
    if DROPOUT:
        grad_weights = tl.where(noise, 0.0, grad_weights * dropout_scale)
    return weights, weights * (grad_weights - delta)


@triton.jit
def row_terms(
    grad_out, out, log_sum, delta, batch, head, batch_head, row, queries, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of the output's gradient, their log sums, and their sums of gradient times output.

    The sums are stored too, for `key_value_gradient_kernel`; programs of several splits store the same.
    """
    inside = row < queries
    grad = load_rows(grad_out, batch, head, row, inside, DIM, BLOCK_D)
    values = load_rows(out, batch, head, row, inside, DIM, BLOCK_D).block
    sums = tl.sum(grad.block.to(tl.float32) * values.to(tl.float32), 1)
    place = batch_head.to(tl.int64) * queries + row
    tl.store(delta + place, sums, mask=inside)
    return grad, tl.load(log_sum + place, mask=inside, other=float("inf")), sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    query, mirrored_query, key, value, out, mirrored_out, log_sum, mirrored_log_sum, grad_out, mirrored_grad_out,
    delta, mirrored_delta, grad_query, mirrored_grad_query, mask, padding, seed,
    batch_heads, heads, queries, keys, tiles, span, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs as of `forward_kernel`; the splits' gradients are added afterwards."""
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head, split = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    row = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    seed_value = 0
    if MASKED or DROPOUT:
        seed_value = tl.load(seed)
    draws = Draws(mask, padding, seed_value, stream, mask_threshold, dropout_threshold, batch, head, batch_head)
    q = load_rows(query, batch, head, row, row < queries, DIM, BLOCK_D)
    grad, logs, sums = row_terms(grad_out, out, log_sum, delta, batch, head, batch_head, row, queries, DIM, BLOCK_D)
    if BRANCHES == 2:
        if not SHARED:
            mirrored_q = load_rows(mirrored_query, batch, head, row, row < queries, DIM, BLOCK_D)
        mirrored_grad, mirrored_logs, mirrored_sums = row_terms(
            mirrored_grad_out, mirrored_out, mirrored_log_sum, mirrored_delta, batch, head, batch_head, row, queries,
            DIM, BLOCK_D,
        )  # fmt: skip
    gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    mirrored_gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin = split * span
    for tile in range(begin, tl.minimum(begin + span, tiles)):
        k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D)
        bias, random, noise = masks(draws, tile, row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws)
        mirrored_scores = mirrored(scores, random, MASKED)
        if BRANCHES == 1:
            scores = mirrored_scores
        grad_weights = products(grad, v, DIM, BLOCK_D, PRECISION)
        _, grad_s = grad_scores(
            scores, scale, logs[:, None], grad_weights, sums[:, None], noise, dropout_scale, DROPOUT
        )
        if BRANCHES == 2:
            if not SHARED:
                mirrored_scores = kept_scores(products(mirrored_q, k, DIM, BLOCK_D, PRECISION), bias, draws)
                mirrored_scores = mirrored(mirrored_scores, random, MASKED)
            grad_weights = products(mirrored_grad, v, DIM, BLOCK_D, PRECISION)
            _, mirrored_grad_s = grad_scores(
                mirrored_scores, scale, mirrored_logs[:, None], grad_weights, mirrored_sums[:, None], noise,
                dropout_scale, DROPOUT,
            )  # fmt: skip
            if SHARED:
                grad_s += mirrored_grad_s
            else:
                mirrored_gradient = add_weighted(mirrored_gradient, mirrored_grad_s, k, PRECISION)
        gradient = add_weighted(gradient, grad_s, k, PRECISION)

    scale *= 0.6931471805599453  # without log2(e)
    part = split.to(tl.int64) * batch_heads * queries * DIM
    target = Matrix(grad_query.data + part, grad_query.batch, grad_query.head, grad_query.row, grad_query.column)
    store_rows(target, batch, head, row, row < queries, gradient * scale, DIM, BLOCK_D)
    if BRANCHES == 2 and not SHARED:
        to = mirrored_grad_query
        target = Matrix(to.data + part, to.batch, to.head, to.row, to.column)
        store_rows(target, batch, head, row, row < queries, mirrored_gradient * scale, DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def key_value_gradient_kernel(
    query, mirrored_query, key, value, log_sum, mirrored_log_sum, grad_out, mirrored_grad_out, delta, mirrored_delta,
    grad_key, grad_value, mask, padding, seed,
    heads, queries, keys, tiles, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (batch * heads + head, tile of keys) walks over all queries of both branches."""
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = batch_head // heads, batch_head % heads
    seed_value = 0
    if MASKED or DROPOUT:
        seed_value = tl.load(seed)
    draws = Draws(mask, padding, seed_value, stream, mask_threshold, dropout_threshold, batch, head, batch_head)
    k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D)
    grad_k = tl.zeros([GROUPS * COLUMNS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([GROUPS * COLUMNS, BLOCK_D], tl.float32)
    for first in range(0, queries, BLOCK_Q):
        row = first + tl.arange(0, BLOCK_Q)
        inside = row < queries
        place = batch_head.to(tl.int64) * queries + row
        bias, random, noise = masks(draws, tile, row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS)
        q = load_rows(query, batch, head, row, inside, DIM, BLOCK_D)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws)
        mirrored_scores = mirrored(scores, random, MASKED)
        if BRANCHES == 1:
            scores = mirrored_scores
        if BRANCHES == 2:
            mirrored_q = q
            if not SHARED:
                mirrored_q = load_rows(mirrored_query, batch, head, row, inside, DIM, BLOCK_D)
                mirrored_scores = kept_scores(products(mirrored_q, k, DIM, BLOCK_D, PRECISION), bias, draws)
                mirrored_scores = mirrored(mirrored_scores, random, MASKED)
            grad_v, mirrored_grad_s = value_gradient(
                grad_v, mirrored_grad_out, mirrored_log_sum + place, mirrored_delta + place, mirrored_scores, v, scale,
                noise, dropout_scale, batch, head, row, inside, DROPOUT, DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            if not SHARED:
                grad_k = add_weighted(grad_k, tl.trans(mirrored_grad_s), mirrored_q, PRECISION)
        grad_v, grad_s = value_gradient(
            grad_v, grad_out, log_sum + place, delta + place, scores, v, scale, noise, dropout_scale, batch,
            head, row, inside, DROPOUT, DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        if SHARED:
            grad_s += mirrored_grad_s
        grad_k = add_weighted(grad_k, tl.trans(grad_s), q, PRECISION)

    grad_k *= scale * 0.6931471805599453  # without log2(e)
    store_rows(grad_key, batch, head, k.row, k.row < keys, grad_k, DIM, BLOCK_D)
    store_rows(grad_value, batch, head, k.row, k.row < keys, grad_v, DIM, BLOCK_D)


@triton.jit
def value_gradient(
    grad_value, grad_out, log_sum, delta, scores, v, scale, noise, dropout_scale, batch, head, row, inside,
    DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The values' gradient with one branch's block of queries added, and the gradient of the block's scores."""
    grad = load_rows(grad_out, batch, head, row, inside, DIM, BLOCK_D)
    logs = tl.load(log_sum, mask=inside, other=float("inf"))
    sums = tl.load(delta, mask=inside, other=0.0)
    grad_weights = products(grad, v, DIM, BLOCK_D, PRECISION)
    weights, grad_s = grad_scores(
        scores, scale, logs[:, None], grad_weights, sums[:, None], noise, dropout_scale, DROPOUT
    )
    if DROPOUT:
        weights = tl.where(noise, 0.0, weights * dropout_scale)
    return add_weighted(grad_value, tl.trans(weights), grad, PRECISION), grad_s


# ------------------------------------------------------------------------------------------------------ launching


def forward(
    queries: list[Tensor],
    key: Tensor,
    value: Tensor,
    outs: list[Tensor],
    log_sums: list[Tensor],
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    mask_threshold: int,
    dropout_threshold: int,
    stream: int,
    scale: float,
) -> None:
    """Writes each branch's output ``[B, H, Lq, D]`` and log2 sums ``[B, H, Lq]``, float32. Last strides are 1."""
    if not outs[0].numel():
        return
    queries, scale = _positive_scale(queries, scale)
    batch, heads, length, dim = queries[0].shape
    plan = config("forward", key, len(outs), dropout_threshold > 0)
    tiling = Tiling.of(plan, mask_threshold + dropout_threshold > 0, key.shape[2])
    blocks = batch * heads * triton.cdiv(length, plan.block_q)
    span, splits = _split(blocks, tiling.count, key.device)
    targets, target_sums = outs, log_sums
    if splits > 1:
        targets = [out.new_empty(splits, *out.shape, dtype=torch.float32) for out in outs]
        target_sums = [out.new_empty(splits, *out.shape[:3], dtype=torch.float32) for out in outs]
    forward_kernel[(blocks, splits)](
        *map(_matrix, _both(queries)), _matrix(key), _matrix(value), *map(_matrix, _both(targets)), *_both(target_sums),
        _matrix(mask), _matrix(key_padding_mask), seed,
        batch * heads, heads, length, key.shape[2], tiling.count, span, stream, mask_threshold, dropout_threshold,
        scale * math.log2(math.e), dropout_scale(dropout_threshold),
        **constants(plan, tiling, len(outs), mask_threshold, dropout_threshold, dim),
    )  # fmt: skip
    if splits > 1:
        block_q = max(16, 2048 // _padded(dim))
        for part, part_sums, out, log_sum in zip(targets, target_sums, outs, log_sums):
            merge_kernel[(batch * heads * triton.cdiv(length, block_q),)](
                part, part_sums, _matrix(out), log_sum, batch * heads, heads, length, splits,
                DIM=dim, BLOCK_D=_padded(dim), BLOCK_Q=block_q,
            )  # fmt: skip


def backward(
    grad_outs: list[Tensor],
    queries: list[Tensor],
    outs: list[Tensor],
    log_sums: list[Tensor],
    key: Tensor,
    value: Tensor,
    grads: list[Tensor],
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    mask_threshold: int,
    dropout_threshold: int,
    stream: int,
    scale: float,
) -> None:
    """Writes `grads`: of the queries, of key and of value. Last strides are 1."""
    *grad_queries, grad_key, grad_value = grads
    if not outs[0].numel():
        grad_key.zero_()
        grad_value.zero_()
        return
    sign = _sign(scale)
    queries, scale = _positive_scale(queries, scale)
    batch, heads, length, dim = queries[0].shape
    branches, drawn = len(outs), mask_threshold + dropout_threshold > 0
    deltas = [torch.empty_like(log_sum) for log_sum in log_sums]
    options = stream, mask_threshold, dropout_threshold, scale * math.log2(math.e), dropout_scale(dropout_threshold)

    plan = config("query_gradient", key, branches, dropout_threshold > 0)
    tiling = Tiling.of(plan, drawn, key.shape[2])
    blocks = batch * heads * triton.cdiv(length, plan.block_q)
    span, splits = _split(blocks, tiling.count, key.device)
    targets = grad_queries
    if splits > 1:
        targets = [grad.new_empty(splits, *grad.shape, dtype=torch.float32) for grad in grad_queries]
    query_gradient_kernel[(blocks, splits)](
        *map(_matrix, _both(queries)), _matrix(key), _matrix(value), *map(_matrix, _both(outs)), *_both(log_sums),
        *map(_matrix, _both(grad_outs)), *_both(deltas), *map(_matrix, _both(targets)), _matrix(mask),
        _matrix(key_padding_mask), seed, batch * heads, heads, length, key.shape[2], tiling.count, span, *options,
        **constants(plan, tiling, branches, mask_threshold, dropout_threshold, dim),
    )  # fmt: skip
    for grad, target in zip(grad_queries, targets):
        if splits > 1:
            grad.copy_(target.sum(0))
        if sign != 1:
            grad.mul_(sign)

    plan = config("key_value_gradient", key, branches, dropout_threshold > 0)
    tiling = Tiling.of(plan, drawn, key.shape[2])
    if tiling.count:
        key_value_gradient_kernel[(batch * heads * tiling.count,)](
            *map(_matrix, _both(queries)), _matrix(key), _matrix(value), *_both(log_sums),
            *map(_matrix, _both(grad_outs)), *_both(deltas), _matrix(grad_key), _matrix(grad_value), _matrix(mask),
            _matrix(key_padding_mask), seed, heads, length, key.shape[2], tiling.count, *options,
            **constants(plan, tiling, branches, mask_threshold, dropout_threshold, dim),
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


def _split(blocks: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Tiles of a program, and how many programs share one block of queries: enough to fill the device."""
    splits = min(max(tiles, 1), max(1, 2 * multiprocessors(device) // blocks))
    span = triton.cdiv(tiles, splits)
    return span, triton.cdiv(tiles, span) if tiles else 1


def constants(
    plan: Config, tiling: Tiling, branches: int, mask_threshold: int, dropout_threshold: int, dim: int
) -> dict[str, Any]:
    """What a kernel is compiled for."""
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


def _sign(scale: float) -> float:
    """-1, 0 or 1; a scale that is 0 in float32 is none."""
    return math.copysign(1, scale) if abs(scale) >= torch.finfo(torch.float32).tiny else 0.0


def _positive_scale(queries: list[Tensor], scale: float) -> tuple[list[Tensor], float]:
    """The kernels take the largest product for the largest score, so that a scale of -1 or 0 goes into the queries."""
    sign = _sign(scale)
    if sign > 0:
        return queries, scale
    return [query * sign for query in queries], -scale if sign else 1.0


def _both(tensors: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Of the branch and of the mirror, None where there is none."""
    return tensors[0], tensors[1] if len(tensors) == 2 else None


def _matrix(tensor: Tensor | None) -> Matrix | None:
    """The last four dimensions; a padding mask `[B, Lk]` has the same row for all heads and queries."""
    if tensor is None:
        return None
    if tensor.dim() == 2:
        return Matrix(tensor, tensor.stride(0), 0, 0, tensor.stride(1))
    return Matrix(tensor, *tensor.stride()[-4:])


def _padded(dim: int) -> int:
    """Channels of a block: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(dim))
