"""The forward pass of attention in Triton, for one branch or both, and the kernel that merges split results.

A program holds a block of queries and iterates over tiles of keys.
"""

import triton
import triton.language as tl

from sgalign.kernels.attention_tiles import (
    NOT_SPECIALIZED,
    Draws,
    add_weighted,
    at,
    kept_scores,
    load_rows,
    load_seed,
    load_tile,
    masks,
    mirrored,
    moved,
    present,
    products,
    store_rows,
)

# If both branches share one query, the exponentials of the mirrored branch (the mirror) are the supervised exponentials
# times a factor. The mirror's maximum may be lower than the supervised maximum by at most this much, in units of log2,
# without loss of digits. If it is lower still in any row of a block, the block is computed again.
SHARED_RANGE = tl.constexpr(16.0)


@triton.jit
def nothing(BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the state of rows before the first key: weighted sum of values, maximum and sum of exponentials."""
    zeros = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    return zeros, tl.full([BLOCK_Q], -float("inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)


@triton.jit
def finite(top):
    """Return the maximum to subtract from the scores.

    It is 0 in rows without any kept entry, because subtracting -inf would make their exponentials NaN instead of 0.
    """
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def add_values(weights, rescale, weighted, total, v, noise, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """Rescale the weighted values and the sum of exponentials, and return them with one tile added."""
    total = total * rescale + tl.sum(weights, 1)
    if DROPOUT:
        weights = tl.where(noise, 0.0, weights)
    return add_weighted(weighted * rescale[:, None], weights, v, PRECISION), total


@triton.jit
def attend(scores, scale, state, v, noise, DROPOUT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the state of the online softmax with one tile added.

    Dropped scores are -inf.
    """
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
    """Return the states of both branches with one tile added, using the same exponentials for both."""
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
    out, logsumexp, state, batch, head, batch_head, split, batch_heads, first, row, queries, dropout_scale,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the output and the log-sum-exps of a block.

    `split` is the index of the part that the program computed. It is 0 if the result is not split.
    """
    weighted, top, total = state
    inside = first + row < queries
    divisor = tl.where(total == 0, 1.0, total)
    values = weighted * (dropout_scale / divisor)[:, None]
    part = split.to(tl.int64) * batch_heads
    store_rows(moved(at(out, batch, head), part * queries * DIM), first, row, inside, values, DIM, BLOCK_D)
    # In rows without any kept entry, inf makes all weights 0 in the backward pass.
    sums = tl.where(total == 0, float("inf"), top + tl.log2(divisor))
    tl.store(logsumexp + (part + batch_head) * queries + first + row, sums, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    query, mirrored_query, key, value, out, mirrored_out, logsumexp, mirrored_logsumexp, mask, padding, seed,
    batch_heads, heads, queries, keys, tiles, span, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Compute the output of a block of queries from `span` tiles of keys, starting at tile `split * span`.

    The first program index counts the blocks of queries of all batches and heads, and the second is the split. If there
    is no explicit or padding mask and all tiles are whole, BOUNDED is False. The kernel then leaves out the checks of
    keys, a sixth of the work of a step.
    """
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head, split = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    first = tl.program_id(0) % blocks * BLOCK_Q
    row = tl.arange(0, BLOCK_Q)
    query_row = first + row
    inside = query_row < queries
    key, value = at(key, batch, head), at(value, batch, head)
    if mask is not None:
        mask = at(mask, batch, head)
    if padding is not None:
        padding = at(padding, batch, head)
    seed = load_seed(seed, MASKED, DROPOUT)
    draws = Draws(mask, padding, seed, stream, mask_threshold, dropout_threshold, batch_head)
    q = load_rows(at(query, batch, head), first, row, inside, DIM, BLOCK_D)
    if BRANCHES == 2 and not SHARED:
        mirrored_q = load_rows(at(mirrored_query, batch, head), first, row, inside, DIM, BLOCK_D)
    state = nothing(BLOCK_Q, BLOCK_D)
    mirrored_state = nothing(BLOCK_Q, BLOCK_D)
    begin = split * span
    end = tl.minimum(begin + span, tiles)
    for tile in range(begin, end):
        k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D, BOUNDED)
        bias, random, noise = masks(draws, tile, query_row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS, BOUNDED)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws, BOUNDED)
        if BRANCHES == 1:
            scores = mirrored(scores, random, MASKED)
        if SHARED:
            state, mirrored_state = attend_both(
                scores, random, scale, state, mirrored_state, v, noise, MASKED, DROPOUT, PRECISION
            )
        else:
            state = attend(scores, scale, state, v, noise, DROPOUT, PRECISION)
        if BRANCHES == 2 and not SHARED:
            scores = kept_scores(products(mirrored_q, k, DIM, BLOCK_D, PRECISION), bias, draws, BOUNDED)
            scores = mirrored(scores, random, MASKED)
            mirrored_state = attend(scores, scale, mirrored_state, v, noise, DROPOUT, PRECISION)

    if SHARED and MASKED:
        # Normally the sum of a row contains the exponential of its maximum, which is 1. A smaller sum means that the
        # mirror's maximum was raised above all of its kept scores, to SHARED_RANGE below the supervised maximum. The
        # block is then computed again. Rows without any kept entry in the supervised branch do not need that.
        if tl.min(tl.where(state[2] > 0, mirrored_state[2], 1.0)) < 0.5:
            mirrored_state = nothing(BLOCK_Q, BLOCK_D)
            for tile in range(begin, end):
                k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D, BOUNDED)
                bias, random, noise = masks(
                    draws, tile, query_row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS, BOUNDED
                )
                scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws, BOUNDED)
                scores = mirrored(scores, random, MASKED)
                mirrored_state = attend(scores, scale, mirrored_state, v, noise, DROPOUT, PRECISION)

    finish(
        out, logsumexp, state, batch, head, batch_head, split, batch_heads, first, row, queries, dropout_scale,
        DIM, BLOCK_D,
    )  # fmt: skip
    if BRANCHES == 2:
        finish(
            mirrored_out, mirrored_logsumexp, mirrored_state, batch, head, batch_head, split, batch_heads, first, row,
            queries, dropout_scale, DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch_heads", "queries", "splits"])
def merge_kernel(
    parts, mirrored_parts, part_sums, mirrored_part_sums, out, mirrored_out, logsumexp, mirrored_logsumexp,
    batch_heads, heads, queries, splits, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Merge the outputs of the splits for a block of queries.

    The first program index counts the blocks of queries of all batches and heads, and the second is the branch.
    """
    if tl.program_id(1) == 0:
        merge(parts, part_sums, out, logsumexp, batch_heads, heads, queries, splits, DIM, BLOCK_D, BLOCK_Q)
    elif mirrored_out is not None:
        merge(
            mirrored_parts, mirrored_part_sums, mirrored_out, mirrored_logsumexp, batch_heads, heads, queries, splits,
            DIM, BLOCK_D, BLOCK_Q,
        )  # fmt: skip


@triton.jit
def merge(
    parts, part_sums, out, logsumexp, batch_heads, heads, queries, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Store a block of one branch: the mean of the splits' outputs, weighted by the splits' sums of exponentials."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    row = tl.arange(0, BLOCK_Q)
    inside = first + row < queries
    channel = tl.arange(0, BLOCK_D)[None, :]
    weighted, top, total = nothing(BLOCK_Q, BLOCK_D)
    for split in range(splits):
        place = (split * batch_heads + batch_head).to(tl.int64) * queries + first + row
        sums = tl.load(part_sums + place, mask=inside, other=float("inf"))
        sums = tl.where(sums == float("inf"), -float("inf"), sums)
        elements = present(inside, channel, DIM, BLOCK_D)
        values = tl.load(parts + place[:, None] * DIM + channel, mask=elements, other=0.0)
        new_top = tl.maximum(top, sums)
        rescale, weight = tl.exp2(top - finite(new_top)), tl.exp2(sums - finite(new_top))
        weighted = weighted * rescale[:, None] + values * weight[:, None]
        total = total * rescale + weight
        top = new_top
    finish(
        out, logsumexp, (weighted, top, total), batch_head // heads, batch_head % heads, batch_head, batch_head * 0,
        batch_heads, first, row, queries, 1.0, DIM, BLOCK_D,
    )  # fmt: skip
