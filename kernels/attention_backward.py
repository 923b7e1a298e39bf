"""The backward of attention in Triton, for one branch or both: gradient of queries, gradients of keys and values.

A program holds a block of queries, or for the gradients of keys and values a tile of keys, and walks over the other.
"""

import triton
import triton.language as tl

from sgalign.kernels.attention_tiles import (
    NOT_SPECIALIZED,
    Draws,
    add_weighted,
    kept_scores,
    load_rows,
    load_seed,
    load_tile,
    masks,
    mirrored,
    moved,
    products,
    store_rows,
)


@triton.jit
def grad_scores(scores, scale, logsumexp, grad_weights, delta, noise, dropout_scale, DROPOUT: tl.constexpr):
    """Return softmax weights, before dropout, and the gradient of the scores."""
    weights = tl.exp2(scores * scale - logsumexp)
    if DROPOUT:
        grad_weights = tl.where(noise, 0.0, grad_weights * dropout_scale)
    return weights, weights * (grad_weights - delta)


@triton.jit
def row_terms(
    grad_out, out, logsumexp, delta, batch, head, batch_head, row, queries, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Return rows of the output's gradient, their logsumexps, and their sums of gradient times output.

    The sums are stored too, for `key_value_gradient_kernel`; programs of several splits store the same.
    """
    inside = row < queries
    grad = load_rows(grad_out, batch, head, row, inside, DIM, BLOCK_D)
    values = load_rows(out, batch, head, row, inside, DIM, BLOCK_D).block
    sums = tl.sum(grad.block.to(tl.float32) * values.to(tl.float32), 1)
    place = batch_head.to(tl.int64) * queries + row
    tl.store(delta + place, sums, mask=inside)
    return grad, tl.load(logsumexp + place, mask=inside, other=float("inf")), sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    query, mirrored_query, key, value, out, mirrored_out, logsumexp, mirrored_logsumexp, grad_out, mirrored_grad_out,
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
    seed = load_seed(seed, MASKED, DROPOUT)
    draws = Draws(mask, padding, seed, stream, mask_threshold, dropout_threshold, batch, head, batch_head)
    q = load_rows(query, batch, head, row, row < queries, DIM, BLOCK_D)
    grad, logs, sums = row_terms(grad_out, out, logsumexp, delta, batch, head, batch_head, row, queries, DIM, BLOCK_D)
    if BRANCHES == 2:
        if not SHARED:
            mirrored_q = load_rows(mirrored_query, batch, head, row, row < queries, DIM, BLOCK_D)
        mirrored_grad, mirrored_logs, mirrored_sums = row_terms(
            mirrored_grad_out, mirrored_out, mirrored_logsumexp, mirrored_delta, batch, head, batch_head, row, queries,
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
    store_rows(moved(grad_query, part), batch, head, row, row < queries, gradient * scale, DIM, BLOCK_D)
    if BRANCHES == 2 and not SHARED:
        target = moved(mirrored_grad_query, part)
        store_rows(target, batch, head, row, row < queries, mirrored_gradient * scale, DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def key_value_gradient_kernel(
    query, mirrored_query, key, value, logsumexp, mirrored_logsumexp, grad_out, mirrored_grad_out,
    delta, mirrored_delta, grad_key, grad_value, mask, padding, seed,
    heads, queries, keys, tiles, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (batch * heads + head, tile of keys) walks over all queries of both branches."""
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = batch_head // heads, batch_head % heads
    seed = load_seed(seed, MASKED, DROPOUT)
    draws = Draws(mask, padding, seed, stream, mask_threshold, dropout_threshold, batch, head, batch_head)
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
                grad_v, mirrored_grad_out, mirrored_logsumexp + place, mirrored_delta + place, mirrored_scores, v,
                scale, noise, dropout_scale, batch, head, row, inside, DROPOUT, DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            if not SHARED:
                grad_k = add_weighted(grad_k, tl.trans(mirrored_grad_s), mirrored_q, PRECISION)
        grad_v, grad_s = value_gradient(
            grad_v, grad_out, logsumexp + place, delta + place, scores, v, scale, noise, dropout_scale, batch,
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
    grad_value, grad_out, logsumexp, delta, scores, v, scale, noise, dropout_scale, batch, head, row, inside,
    DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the values' gradient with one branch's block of queries added, and the gradient of the block's scores."""
    grad = load_rows(grad_out, batch, head, row, inside, DIM, BLOCK_D)
    logs = tl.load(logsumexp, mask=inside, other=float("inf"))
    sums = tl.load(delta, mask=inside, other=0.0)
    grad_weights = products(grad, v, DIM, BLOCK_D, PRECISION)
    weights, grad_s = grad_scores(
        scores, scale, logs[:, None], grad_weights, sums[:, None], noise, dropout_scale, DROPOUT
    )
    if DROPOUT:
        weights = tl.where(noise, 0.0, weights * dropout_scale)
    return add_weighted(grad_value, tl.trans(weights), grad, PRECISION), grad_s
