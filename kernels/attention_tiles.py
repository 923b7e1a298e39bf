"""The parts of which the attention kernels are made: tiles of rows, products, masks, random numbers.

A tile of keys is a block of neighbours where nothing is drawn. Where something is, it is `GROUPS` strips of `COLUMNS`
keys that lie 32 apart, so that one Philox call for a row and a column decides `GROUPS` keys
(`sgalign.ops.reference.random_mask` has the definition).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

NOT_SPECIALIZED = ["batch_heads", "queries", "keys", "tiles", "span", "stream", "mask_threshold", "dropout_threshold"]
WIDEST = tl.constexpr(16)  # float32 channels of a row that `products` holds at once
DROPOUT_BIT = tl.constexpr(0x80000000)  # of the stream: reference.DROPOUT_STREAM_BIT


class Matrix(NamedTuple):
    """The rows of one batch and head; strides count elements."""

    data: Any
    row: Any
    column: Any


class Rows(NamedTuple):
    """Some rows of a `Matrix` that begins at the first of them."""

    block: Any  # [rows, BLOCK_D]; tuples of Triton have `values` already
    matrix: Any
    row: Any  # counted from the matrix's first
    inside: Any


class Draws(NamedTuple):
    """The arguments of a program's random numbers, and the masks that need none, from its batch and head on.

    A kernel makes it itself: before Triton 3.7 no function returns None, as which a mask may come.
    """

    mask: Any
    padding: Any
    seed: Any
    stream: Any
    mask_threshold: Any
    dropout_threshold: Any
    batch_head: Any


@triton.jit
def at(tensor, batch, head):
    """Return the `Matrix` of a batch and head of a tensor, which comes with its strides by these, row and column."""
    data, of_batch, of_head, of_row, of_column = tensor
    return Matrix(data + batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head, of_row, of_column)


@triton.jit
def moved(matrix, elements):
    """Return the matrix that begins `elements` further on."""
    return Matrix(matrix.data + elements, matrix.row, matrix.column)


@triton.jit
def load(matrix, row, column, inside, other):
    """Return the elements at `row` and `column`, which broadcast; `other` where not `inside`."""
    place = row.to(tl.int64) * matrix.row + column.to(tl.int64) * matrix.column
    return tl.load(matrix.data + place, mask=inside, other=other)


@triton.jit
def present(inside, channel, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return which elements of a block exist, by which rows are `inside`."""
    result = inside[:, None]
    if DIM < BLOCK_D:
        result = result & (channel < DIM)
    return result


@triton.jit
def load_rows(matrix, first, row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return `[rows, BLOCK_D]`, zeros beyond the channels and for rows not `inside`: what those hold must not leak.

    Rows are counted from `first` on, whose place is one 64-bit number; a loop computes the others' once.
    """
    matrix = moved(matrix, tl.full([], first, tl.int64) * matrix.row)
    channel = tl.arange(0, BLOCK_D)[None, :]
    values = load(matrix, row[:, None], channel, present(inside, channel, DIM, BLOCK_D), 0.0)
    return Rows(values, matrix, row, inside)


@triton.jit
def products(rows, others, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Return `[rows, others]`: the product of each row with each of the others, over all channels.

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
    """Return `total` with the sums of rows by each row of weights added."""
    return tl.dot(weights.to(rows.block.dtype), rows.block, total, input_precision=PRECISION)


@triton.jit
def load_channels(rows, first, DIM: tl.constexpr):
    """Return `WIDEST` channels of each row, from `first` on."""
    channel = first + tl.arange(0, WIDEST)[None, :]
    return load(rows.matrix, rows.row[:, None], channel, rows.inside[:, None] & (channel < DIM), 0.0)


@triton.jit
def store_rows(matrix, first, row, inside, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write `[rows, BLOCK_D]` from row `first` on, in the matrix's dtype, without the channels beyond its own."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    place = (first + row).to(tl.int64)[:, None] * matrix.row + channel
    target = matrix.data + place
    tl.store(target, values.to(matrix.data.dtype.element_ty), mask=present(inside, channel, DIM, BLOCK_D))


@triton.jit
def first_key(tile, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the index of a tile's first key."""
    if GROUPS == 1:
        return tile * COLUMNS
    return tile // (32 // COLUMNS) * (32 * GROUPS) + tile % (32 // COLUMNS) * COLUMNS


@triton.jit
def drawn(draws, stream, threshold, tile, query, GROUPS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return which entries of a tile draw a number below the threshold: `[BLOCK_Q, GROUPS * COLUMNS]`.

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
    key, value, draws, tile, keys, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Return a tile of keys and their values; where BOUNDED, `inside` are those that exist and are not padding."""
    first = first_key(tile, GROUPS, COLUMNS)
    place = tl.arange(0, GROUPS * COLUMNS)
    row = place // COLUMNS * 32 + place % COLUMNS
    kept = tl.full([GROUPS * COLUMNS], True, tl.int1)
    if BOUNDED:
        kept = first + row < keys
        if draws.padding is not None:
            kept = kept & (load(draws.padding, row * 0, first + row, kept, 1) == 0)
    k = load_rows(key, first, row, kept, DIM, BLOCK_D)
    return k, load_rows(value, first, row, kept, DIM, BLOCK_D)


@triton.jit
def masks(
    draws, tile, query, queries, k, keys, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Return what both branches drop, what the random mask drops, and what dropout does.

    The first is 0 for what is kept and -inf for what is dropped, broadcastable to `[BLOCK_Q, BLOCK_K]`. It is nothing
    of a tile that is not BOUNDED.
    """
    bias, random, noise = 0.0, False, False
    if BOUNDED:
        bias = tl.where(k.inside, 0.0, -float("inf"))[None, :]
        if draws.mask is not None:
            key = first_key(tile, GROUPS, COLUMNS) + k.row
            inside = (query < queries)[:, None] & (key < keys)[None, :]
            explicit = load(draws.mask, query[:, None], key[None, :], inside, 1)
            bias = tl.where(explicit != 0, -float("inf"), bias)
    if MASKED:
        random = drawn(draws, draws.stream, draws.mask_threshold, tile, query, GROUPS, COLUMNS)
    if DROPOUT:
        stream = draws.stream.to(tl.uint32) | DROPOUT_BIT
        noise = drawn(draws, stream, draws.dropout_threshold, tile, query, GROUPS, COLUMNS)
    return bias, random, noise


@triton.jit
def kept_scores(scores, bias, draws, BOUNDED: tl.constexpr):
    """Return the scores, -inf where both branches drop them.

    Padding was loaded as 0; what the explicit mask drops may be NaN.
    """
    if BOUNDED:
        scores = tl.where(bias == 0, scores, -float("inf")) if draws.mask is not None else scores + bias
    return scores


@triton.jit
def mirrored(scores, random, MASKED: tl.constexpr):
    """Return the scores, -inf where the random mask drops them."""
    if MASKED:
        return tl.where(random, -float("inf"), scores)
    return scores


@triton.jit
def load_seed(seed, MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """Return the seed, which is read where anything is drawn."""
    value = tl.zeros([], tl.int64)
    if MASKED or DROPOUT:
        value = tl.load(seed)
    return value
