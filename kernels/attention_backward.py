"""The backward pass of attention in Triton, for one branch or both.

There are two main kernels. In the kernel for the gradient of the queries, a program holds a block of queries and
iterates over tiles of keys. In the kernel for the gradients of keys and values, a program holds a tile of keys and
iterates over blocks of queries.
"""

import triton
import triton.language as tl

from sgalign.kernels.attention_tiles import (
    NOT_SPECIALIZED,
    Draws,
    add_weighted,
    at,
    first_key,
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


@triton.jit
def grad_scores(weights, grad_weights, delta, noise, dropout_scale, DROPOUT: tl.constexpr):
    """Return the gradient of the scores, given the softmax `weights` before dropout."""
    if DROPOUT:
        grad_weights = tl.where(noise, 0.0, grad_weights * dropout_scale)
    return weights * (grad_weights - delta)


@triton.jit
def row_terms(
    grad_out, out, logsumexp, delta, batch, head, place, first, row, inside, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Return rows of the output's gradient, their log-sum-exps, and the sums over channels of gradient times output.

    The sums are also stored for `key_value_gradient_kernel`. All splits store the same sums.
    """
    grad = load_rows(at(grad_out, batch, head), first, row, inside, DIM, BLOCK_D)
    values = load_rows(at(out, batch, head), first, row, inside, DIM, BLOCK_D).block
    sums = tl.sum(grad.block.to(tl.float32) * values.to(tl.float32), 1)
    tl.store(delta + place, sums, mask=inside)
    return grad, tl.load(logsumexp + place, mask=inside, other=float("inf")), sums


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def query_gradient_kernel(
    query, mirrored_query, key, value, out, mirrored_out, logsumexp, mirrored_logsumexp, grad_out, mirrored_grad_out,
    delta, mirrored_delta, grad_query, mirrored_grad_query, mask, padding, seed,
    batch_heads, heads, queries, keys, tiles, span, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    grad_scale, BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of the queries. The work is divided among programs as in `forward_kernel`.

    `add_kernel` adds the gradients of the splits afterwards.
    """
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head, split = tl.program_id(0) // blocks, tl.program_id(1)
    batch, head = batch_head // heads, batch_head % heads
    first = tl.program_id(0) % blocks * BLOCK_Q
    row = tl.arange(0, BLOCK_Q)
    query_row = first + row
    inside = query_row < queries
    place = batch_head.to(tl.int64) * queries + query_row
    key, value = at(key, batch, head), at(value, batch, head)
    if mask is not None:
        mask = at(mask, batch, head)
    if padding is not None:
        padding = at(padding, batch, head)
    seed = load_seed(seed, MASKED, DROPOUT)
    draws = Draws(mask, padding, seed, stream, mask_threshold, dropout_threshold, batch_head)
    q = load_rows(at(query, batch, head), first, row, inside, DIM, BLOCK_D)
    grad, logs, sums = row_terms(grad_out, out, logsumexp, delta, batch, head, place, first, row, inside, DIM, BLOCK_D)
    if BRANCHES == 2:
        if not SHARED:
            mirrored_q = load_rows(at(mirrored_query, batch, head), first, row, inside, DIM, BLOCK_D)
        mirrored_grad, mirrored_logs, mirrored_sums = row_terms(
            mirrored_grad_out, mirrored_out, mirrored_logsumexp, mirrored_delta, batch, head, place, first, row, inside,
            DIM, BLOCK_D,
        )  # fmt: skip
    gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    mirrored_gradient = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin = split * span
    for tile in range(begin, tl.minimum(begin + span, tiles)):
        k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D, BOUNDED)
        bias, random, noise = masks(draws, tile, query_row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS, BOUNDED)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws, BOUNDED)
        mirrored_scores = mirrored(scores, random, MASKED)
        if BRANCHES == 1:
            scores = mirrored_scores
        grad_weights = products(grad, v, DIM, BLOCK_D, PRECISION)
        weights = tl.exp2(scores * scale - logs[:, None])
        grad_s = grad_scores(weights, grad_weights, sums[:, None], noise, dropout_scale, DROPOUT)
        if BRANCHES == 2:
            if not SHARED:
                gradient = add_weighted(gradient, grad_s, k, PRECISION)
                mirrored_scores = kept_scores(products(mirrored_q, k, DIM, BLOCK_D, PRECISION), bias, draws, BOUNDED)
                mirrored_scores = mirrored(mirrored_scores, random, MASKED)
            grad_weights = products(mirrored_grad, v, DIM, BLOCK_D, PRECISION)
            weights = tl.exp2(mirrored_scores * scale - mirrored_logs[:, None])
            mirrored_grad_s = grad_scores(weights, grad_weights, mirrored_sums[:, None], noise, dropout_scale, DROPOUT)
            if SHARED:
                grad_s += mirrored_grad_s
            else:
                mirrored_gradient = add_weighted(mirrored_gradient, mirrored_grad_s, k, PRECISION)
        if BRANCHES == 1 or SHARED:
            gradient = add_weighted(gradient, grad_s, k, PRECISION)

    part = split.to(tl.int64) * batch_heads * queries * DIM
    target = moved(at(grad_query, batch, head), part)
    store_rows(target, first, row, inside, gradient * grad_scale, DIM, BLOCK_D)
    if BRANCHES == 2 and not SHARED:
        target = moved(at(mirrored_grad_query, batch, head), part)
        store_rows(target, first, row, inside, mirrored_gradient * grad_scale, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batch_heads", "queries", "splits"])
def add_kernel(
    parts, mirrored_parts, grad_query, mirrored_grad_query, batch_heads, heads, queries, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the splits for a block of queries.

    The first program index counts the blocks of queries of all batches and heads, and the second is the branch.
    """
    if tl.program_id(1) == 0:
        add_parts(parts, grad_query, batch_heads, heads, queries, splits, DIM, BLOCK_D, BLOCK_Q)
    elif mirrored_grad_query is not None:
        add_parts(mirrored_parts, mirrored_grad_query, batch_heads, heads, queries, splits, DIM, BLOCK_D, BLOCK_Q)


@triton.jit
def add_parts(
    parts, grad, batch_heads, heads, queries, splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Add the splits' gradients of a block of queries of one branch, in the order of the splits, and store the sum."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    batch_head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_Q
    row = tl.arange(0, BLOCK_Q)
    inside = first + row < queries
    channel = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for split in range(splits):
        place = (split * batch_heads + batch_head).to(tl.int64) * queries + first + row
        elements = present(inside, channel, DIM, BLOCK_D)
        total += tl.load(parts + place[:, None] * DIM + channel, mask=elements, other=0.0)
    store_rows(at(grad, batch_head // heads, batch_head % heads), first, row, inside, total, DIM, BLOCK_D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def key_value_gradient_kernel(
    query, mirrored_query, key, value, logsumexp, mirrored_logsumexp, grad_out, mirrored_grad_out,
    delta, mirrored_delta, grad_key, grad_value, mask, padding, seed,
    heads, queries, keys, tiles, stream, mask_threshold, dropout_threshold, scale, dropout_scale,
    grad_scale, BRANCHES: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of keys and values from all queries of both branches.

    The program index counts the tiles of all batches and heads. Given the log-sum-exps and deltas, the gradients of a
    key do not depend on other keys. The gradients of padding are therefore set to zero once, at the end.
    """
    SHARED: tl.constexpr = BRANCHES == 2 and mirrored_query is None
    EXPLICIT: tl.constexpr = mask is not None
    batch_head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = batch_head // heads, batch_head % heads
    query, grad_out = at(query, batch, head), at(grad_out, batch, head)
    if BRANCHES == 2:
        mirrored_grad_out = at(mirrored_grad_out, batch, head)
        if not SHARED:
            mirrored_query = at(mirrored_query, batch, head)
    if mask is not None:
        mask = at(mask, batch, head)
    if padding is not None:
        padding = at(padding, batch, head)
    seed = load_seed(seed, MASKED, DROPOUT)
    draws = Draws(mask, padding, seed, stream, mask_threshold, dropout_threshold, batch_head)
    key, value = at(key, batch, head), at(value, batch, head)
    k, v = load_tile(key, value, draws, tile, keys, GROUPS, COLUMNS, DIM, BLOCK_D, True)
    grad_k = tl.zeros([GROUPS * COLUMNS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([GROUPS * COLUMNS, BLOCK_D], tl.float32)
    row = tl.arange(0, BLOCK_Q)
    for first in range(0, queries, BLOCK_Q):
        inside = first + row < queries
        place = batch_head.to(tl.int64) * queries + first + row
        bias, random, noise = masks(
            draws, tile, first + row, queries, k, keys, MASKED, DROPOUT, GROUPS, COLUMNS, EXPLICIT
        )
        q = load_rows(query, first, row, inside, DIM, BLOCK_D)
        scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws, EXPLICIT)
        mirrored_scores = mirrored(scores, random, MASKED)
        if BRANCHES == 1:
            scores = mirrored_scores
        grad_v, grad_s = value_gradient(
            grad_v, grad_out, logsumexp + place, delta + place, scores, v, scale, noise, dropout_scale, first, row,
            inside, DROPOUT, DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        if BRANCHES == 2:
            if not SHARED:  # one branch after the other, because the registers cannot hold the scores of both
                grad_k = add_weighted(grad_k, tl.trans(grad_s), q, PRECISION)
                q = load_rows(mirrored_query, first, row, inside, DIM, BLOCK_D)
                mirrored_scores = kept_scores(products(q, k, DIM, BLOCK_D, PRECISION), bias, draws, EXPLICIT)
                mirrored_scores = mirrored(mirrored_scores, random, MASKED)
            grad_v, mirrored_grad_s = value_gradient(
                grad_v, mirrored_grad_out, mirrored_logsumexp + place, mirrored_delta + place, mirrored_scores, v,
                scale, noise, dropout_scale, first, row, inside, DROPOUT, DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
            grad_s = grad_s + mirrored_grad_s if SHARED else mirrored_grad_s
        grad_k = add_weighted(grad_k, tl.trans(grad_s), q, PRECISION)

    grad_k *= grad_scale
    first = first_key(tile, GROUPS, COLUMNS)
    kept, exists = k.inside[:, None], first + k.row < keys
    store_rows(at(grad_key, batch, head), first, k.row, exists, tl.where(kept, grad_k, 0.0), DIM, BLOCK_D)
    store_rows(at(grad_value, batch, head), first, k.row, exists, tl.where(kept, grad_v, 0.0), DIM, BLOCK_D)


@triton.jit
def value_gradient(
    grad_value, grad_out, logsumexp, delta, scores, v, scale, noise, dropout_scale, first, row, inside,
    DROPOUT: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the gradient of the values with a block of one branch's queries added, and the gradient of the scores."""
    grad = load_rows(grad_out, first, row, inside, DIM, BLOCK_D)
    logs = tl.load(logsumexp, mask=inside, other=float("inf"))
    sums = tl.load(delta, mask=inside, other=0.0)
    weights = tl.exp2(scores * scale - logs[:, None])
    kept = weights
    if DROPOUT:
        kept = tl.where(noise, 0.0, weights * dropout_scale)
    grad_value = add_weighted(grad_value, tl.trans(kept), grad, PRECISION)
    grad_weights = products(grad, v, DIM, BLOCK_D, PRECISION)
    return grad_value, grad_scores(weights, grad_weights, sums[:, None], noise, dropout_scale, DROPOUT)
