"""The functions that the attention kernels share: tiles of rows, matrix products, masks and random numbers.

If nothing is drawn, a tile of keys is a block of neighboring keys. Otherwise it consists of `GROUPS` strips of
`COLUMNS` keys, and the strips are 32 keys apart. One Philox call for a row and a column then decides `GROUPS` keys
(`sgalign.ops.reference.random_mask` has the definition).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

NOT_SPECIALIZED = ["batch_heads", "queries", "keys", "tiles", "span", "stream", "mask_threshold", "dropout_threshold"]
WIDEST = tl.constexpr(16)  # number of float32 channels per row that `products` holds at once
DROPOUT_BIT = tl.constexpr(0x80000000)  # reference.DROPOUT_STREAM_BIT, set in the stream for dropout


class Matrix(NamedTuple):
    """The rows of one head of one batch element, with strides in elements."""

    data: Any
    row: Any
    column: Any


class Rows(NamedTuple):
    """A block of rows. `matrix` begins at the first row of the block."""

    block: Any  # [rows, BLOCK_D]; not named `values`, because tuples in Triton have that attribute
    matrix: Any
    row: Any  # counted from the first row of the matrix
    inside: Any


class Draws(NamedTuple):
    """The arguments for drawing a program's random numbers, and its explicit and padding masks.

    Each kernel builds this tuple inline. A mask may be None, and before Triton 3.7 a function cannot return None.
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
    """Return the `Matrix` of one head of one batch element.

    `tensor` is the data with its batch, head, row and column strides.
    """
    data, of_batch, of_head, of_row, of_column = tensor
    return Matrix(data + batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head, of_row, of_column)


@triton.jit
def moved(matrix, elements):
    """Return the matrix with its beginning moved forward by a number of elements."""
    return Matrix(matrix.data + elements, matrix.row, matrix.column)


@triton.jit
def load(matrix, row, column, inside, other):
    """Return the elements at `row` and `column`, broadcast against each other. Elements not `inside` become `other`."""
    place = row.to(tl.int64) * matrix.row + column.to(tl.int64) * matrix.column
    return tl.load(matrix.data + place, mask=inside, other=other)


@triton.jit
def present(inside, channel, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return a mask of the elements that exist in a block.

    `inside` is the mask of its rows.
    """
    result = inside[:, None]
    if DIM < BLOCK_D:
        result = result & (channel < DIM)
    return result


@triton.jit
def load_rows(matrix, first, row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load a block of rows, `[rows, BLOCK_D]`.

    The block is zero beyond the channels and in rows not `inside`, so their contents in memory have no effect. Rows are
    counted from row `first`. In a loop, only the address of row `first` changes, a single 64-bit number. The offsets of
    the rows from it are computed once.
    """
    matrix = moved(matrix, tl.full([], first, tl.int64) * matrix.row)
    channel = tl.arange(0, BLOCK_D)[None, :]
    values = load(matrix, row[:, None], channel, present(inside, channel, DIM, BLOCK_D), 0.0)
    return Rows(values, matrix, row, inside)


@triton.jit
def products(rows, others, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Return the products of all rows with all others over the channels, `[rows, others]`.

    The matrix units need all channels of a row in the registers of one thread. Float32 channels need twice the
    registers, because each number is split into two parts. Float32 products therefore load only `WIDEST` channels at a
    time. Every product loads them again, from the cache.
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
    """Return `total + weights @ rows`."""
    return tl.dot(weights.to(rows.block.dtype), rows.block, total, input_precision=PRECISION)


@triton.jit
def load_channels(rows, first, DIM: tl.constexpr):
    """Return `WIDEST` channels of each row, starting at channel `first`."""
    channel = first + tl.arange(0, WIDEST)[None, :]
    return load(rows.matrix, rows.row[:, None], channel, rows.inside[:, None] & (channel < DIM), 0.0)


@triton.jit
def store_rows(matrix, first, row, inside, values, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a block `[rows, BLOCK_D]` in the dtype of the matrix, starting at row `first`, without padding channels."""
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
    """Return a mask of the entries of a tile whose random number is below the threshold, `[BLOCK_Q, GROUPS * COLUMNS]`.

    The mask is used in the layout of a matrix product's result. In that layout, a thread holds the same column of all
    groups, so each thread draws the numbers that it needs.
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
    # The upper half of `number` is the 16-bit random number. It is below the threshold if `number` is at most this
    # limit. A threshold of 65536 wraps to a limit of all ones.
    return number <= (threshold.to(tl.uint32) << 16) - 1


@triton.jit
def load_tile(
    key, value, draws, tile, keys, GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Return a tile of keys and their values.

    If BOUNDED, `inside` marks the keys that exist and are not padding.
    """
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
    """Return the bias of both branches, the entries that the random mask drops, and the entries that dropout drops.

    The bias is 0 for kept entries and -inf for entries that both branches drop. It can be broadcast to
    `[BLOCK_Q, BLOCK_K]`. A tile that is not BOUNDED has a bias of 0.
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
    """Return the scores with -inf for the entries that both branches drop.

    Scores of padding are 0, so adding the bias is enough. Scores that the explicit mask drops may be NaN, so they are
    replaced.
    """
    if BOUNDED:
        scores = tl.where(bias == 0, scores, -float("inf")) if draws.mask is not None else scores + bias
    return scores


@triton.jit
def mirrored(scores, random, MASKED: tl.constexpr):
    """Return the scores with -inf for the entries that the random mask drops."""
    if MASKED:
        return tl.where(random, -float("inf"), scores)
    return scores


@triton.jit
def load_seed(seed, MASKED: tl.constexpr, DROPOUT: tl.constexpr):
    """Return the seed, which is read from memory only if something is drawn."""
    value = tl.zeros([], tl.int64)
    if MASKED or DROPOUT:
        value = tl.load(seed)
    return value
