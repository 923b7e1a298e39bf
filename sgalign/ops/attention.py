"""Masked attention for one branch, or for a supervised and a mirrored branch in one pass over the keys.

Both public functions run the same operation, on one or two branches. A call goes through these steps:

1. `fused_masked_attention` or `dual_branch_attention` checks the arguments and calls `_Attention` (autograd).
2. `_Attention` calls the registered operation ``sgalign::attention``. If torch's dispatcher has nothing to add
   (_autograd.py), it calls the implementation `_forward` directly.
3. `_forward` allocates the outputs and calls the backend's launch function from the table `FORWARD` in
   _attention_backends.py.

The gradients take the same steps: `_Attention.backward`, then ``sgalign::attention_backward`` or `_backward`, then the
table `BACKWARD`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import backends, reference
from sgalign.ops._attention_backends import BACKWARD, FORWARD, OPTIONS_SCHEMA, Call, Options
from sgalign.ops._autograd import call, differentiable_once, distinct, is_plain
from sgalign.ops._operands import (
    Tensors,
    accumulated_dtype,
    cast,
    check_bool,
    check_device,
    check_dtype,
    check_floating,
    check_tensor,
    computed_dtype,
    empty_like,
    once_a_signature,
    unit_stride,
    without_autocast,
)
from sgalign.ops.random_mask import check_seed, check_stream, ratio_threshold, seed_tensor

MAX_DIM = 256  # channels per head
MAX_SCALE = torch.finfo(torch.float32).max / 2  # half the largest number, because the kernels multiply it by log2(e)


# ------------------------------------------------------------------------------------------------------ public


def fused_masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    mask_ratio: float = 0.0,
    mask_seed: int | Tensor | None = None,
    mask_stream: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute attention with a random mask, applied *before* the softmax and never stored.

    The scores are ``S = scale * Q K^T``. An entry is dropped by `mask`, by `key_padding_mask` or, with probability
    `mask_ratio`, by the random mask. The output is the softmax over the kept entries of each row, times V.

    The random mask is not dropout. The softmax normalizes the kept entries, so nothing is rescaled by
    ``1 / (1 - mask_ratio)``. A row without any kept entry gives zeros, and its gradients are zero. The mirrored branch
    of Xu, Liao and Sigal ("Self-Supervised Relation Alignment for Scene Graph Generation", WACV 2024) is masked in this
    way.

    The backward pass is deterministic and draws the same mask again from the seed. Besides the inputs, it needs only
    the output and one number per row. The function is differentiable once in `query`, `key` and `value`. Autocast casts
    the inputs as it does for `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: the queries, ``[B, H, Lq, D]``, float32, float64, bfloat16 or float16. D is at most 256. Queries, keys
            and values may have any strides, but a tensor is copied if its last stride is not 1.
        key, value: the keys and values, ``[B, H, Lk, D]``, of the query's dtype and device.
        mask: an explicit mask, bool, broadcastable to ``[B, H, Lq, Lk]``. True means dropped.
        mask_ratio: the probability that the random mask drops an entry, in [0, 1], rounded to a multiple of 1/65536.
        mask_seed: the seed of the random mask and of dropout, an int or an int64 scalar tensor on the query's device.
            If None, a seed is drawn from torch's generator, so `torch.manual_seed` reproduces the result. It is drawn
            only if `mask_ratio` or `dropout_p` is positive.
        mask_stream: a number in [0, 2**31). Attention blocks that share a seed need different streams.
        key_padding_mask: the padding among the keys, bool ``[B, Lk]``. True means ignored, as in
            `torch.nn.MultiheadAttention`. Ignored keys and values, even NaN, affect nothing if the queries are finite.
        dropout_p: the probability of ordinary dropout after the softmax, in [0, 1], rounded as `mask_ratio` is. The
            kept weights are scaled by ``1 / (1 - dropout_p)``. The dropout noise comes from the same seed.
        scale: the factor of the scores. If None, ``1 / sqrt(D)``.
        backend: "cpu" (the compiled core), "triton" or "cuda" (GPUs), or "reference" (plain PyTorch). If None, the
            default for the device and dtype (`sgalign.ops.backends.choose`).

    Returns:
        The output, ``[B, H, Lq, D]``, in the query's dtype and memory order. Under autocast, it has autocast's dtype,
        unless the inputs are float64.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or range.
        ImportError: if the compiled core is not built or was built from other sources, or the backend is not installed.
        RuntimeError: in the backward pass, if second-order gradients are requested and the backend is not "reference".
    """
    (out,) = _attention(
        [query], 1, key, value, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend
    )
    return out


def dual_branch_attention(
    query: Tensor,
    mirrored_query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    mask_ratio: float = 0.0,
    mask_seed: int | Tensor | None = None,
    mask_stream: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of the supervised and the mirrored branch in one pass over keys and values.

    ``out`` is `fused_masked_attention` of `query` without the random mask. ``mirrored_out`` is
    `fused_masked_attention` of `mirrored_query` with the random mask. Both branches use the same `mask`, the same
    `key_padding_mask` and the same dropout noise. The only differences between them are the queries and the random
    mask.

    Pass the same tensor object as `query` and `mirrored_query` if the two are equal, as in a decoder's first layer.
    Scores and exponentials are then computed only once.

    Args:
        query: the queries of the supervised branch, ``[B, H, Lq, D]``.
        mirrored_query: the queries of the mirrored branch, ``[B, H, Lq, D]``.
        key, value: the keys and values of both branches, ``[B, H, Lk, D]``.
        mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend: as in
            `fused_masked_attention`.

    Returns:
        ``(out, mirrored_out)``, each ``[B, H, Lq, D]``.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: as in `fused_masked_attention`.
    """
    queries = [query] if mirrored_query is query else [query, mirrored_query]
    out, mirrored_out = _attention(
        queries, 2, key, value, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend
    )
    return out, mirrored_out


def _attention(
    queries: Tensors,
    branches: int,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    mask_ratio: float,
    mask_seed: int | Tensor | None,
    mask_stream: int,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """Return the outputs of one or two branches.

    Two branches may share one query. The random mask applies to the last branch.
    """
    query, mirrored_query = queries[0], queries[1] if len(queries) == 2 else None
    plain = is_plain(query, mirrored_query, key, value, mask, key_padding_mask, mask_seed)
    _check(plain, query, mirrored_query, key, value, mask, key_padding_mask)
    thresholds = ratio_threshold(mask_ratio, "mask_ratio"), ratio_threshold(dropout_p, "dropout_p")
    check_stream(mask_stream, "mask_stream")
    check_seed(mask_seed, query.device, "mask_seed")
    scale = _checked_scale(scale, query.shape[3])
    dtype = computed_dtype(query)
    backend = backends.choose(backend, query.device, dtype)
    queries, key, value = [cast(query, dtype) for query in queries], cast(key, dtype), cast(value, dtype)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    seed = seed_tensor(mask_seed, query.device) if any(thresholds) else None
    options = Options(mask, key_padding_mask, seed, *thresholds, mask_stream, scale)
    if backend == "reference":
        return _reference(queries, branches, key, value, options)
    query, key, value, *others = distinct([queries[0], key, value, *queries[1:]])
    outputs = call(_Attention, plain, backend, query, *(others or [None]), branches, key, value, options)
    return outputs[:branches]


def _reference(queries: Tensors, branches: int, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, ...]:
    """Return the outputs of one or two branches, computed in plain PyTorch, with the random mask in the last branch.

    This function takes the place of the registered operation, so autograd can differentiate it any number of times.
    Like the kernels, it computes in float32 or float64, because scores may exceed 65504, the largest float16 number.
    """
    dtype, accumulated = key.dtype, accumulated_dtype(key.dtype)
    queries = [cast(query, accumulated) for query in queries]
    key, value = cast(key, accumulated), cast(value, accumulated)
    batch, heads, length, _ = queries[0].shape

    def draw(threshold: int, stream: int) -> Tensor:
        assert options.seed is not None
        random = reference.random_mask(
            batch * heads, length, key.shape[2], threshold=threshold, seed=options.seed, stream=stream,
            device=key.device,
        )  # fmt: skip
        return random.view(batch, heads, length, key.shape[2])

    dropout_keep = None
    if options.dropout_threshold:
        dropout_keep = ~draw(options.dropout_threshold, options.stream | reference.DROPOUT_STREAM_BIT)
    outs = []
    for branch in range(branches):
        dropped = options.mask
        if branch == branches - 1 and options.mask_threshold:
            random = draw(options.mask_threshold, options.stream)
            dropped = random if dropped is None else dropped | random
        with without_autocast(key.device):
            out = reference.attention(
                queries[min(branch, len(queries) - 1)],
                key,
                value,
                dropped=dropped,
                key_padding_mask=options.key_padding_mask,
                dropout_keep=dropout_keep,
                dropout_scale=options.dropout_scale,
                scale=options.scale,
            )
        outs.append(cast(out, dtype))
    return tuple(outs)


# ------------------------------------------------------------------------------------------------------ checks


@once_a_signature
def _check(
    query: Tensor,
    mirrored_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    rows = {"query": query, "mirrored_query": mirrored_query, "key": key, "value": value}
    _check_rows({name: tensor for name, tensor in rows.items() if tensor is not None or name != "mirrored_query"})
    _check_masks(mask, key_padding_mask, query, key.shape[2])


def _check_rows(rows: dict[str, Any]) -> None:
    for name, tensor in rows.items():
        check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise InputError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions: {list(tensor.shape)}")
        check_floating(name, tensor)
    query, key = rows["query"], rows["key"]
    batch, heads, _, dim = query.shape
    for name, tensor in list(rows.items())[1:]:
        expected = query.shape if name == "mirrored_query" else (batch, heads, key.shape[2], dim)
        if tensor.shape != expected:
            raise InputError(
                f"{name} must be {list(expected)} to match query {list(query.shape)}"
                f"{' and key ' + str(list(key.shape)) if name == 'value' else ''}, got {list(tensor.shape)}"
            )
        check_device(name, tensor, query.device, "the query's device")
        check_dtype(name, tensor, query, "the query's dtype")
    if dim > MAX_DIM:
        raise InputError(f"query must have at most {MAX_DIM} channels per head (D), got {dim}")


def _check_masks(mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, keys: int) -> None:
    batch, heads, length, _ = query.shape
    for name, boolean, shape in (
        ("mask", mask, (batch, heads, length, keys)),
        ("key_padding_mask", key_padding_mask, (batch, keys)),
    ):
        if boolean is None:
            continue
        check_bool(name, boolean)
        check_device(name, boolean, query.device, "the query's device")
        if name == "mask":
            fits = boolean.dim() <= 4 and all(size in (1, full) for size, full in zip(boolean.shape[::-1], shape[::-1]))
        else:
            fits = boolean.shape == shape
        if not fits:
            how = "broadcastable to" if name == "mask" else "of shape"
            raise InputError(f"{name} must be {how} {list(shape)}, got {list(boolean.shape)}")


def _checked_scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(dim) if dim else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not -MAX_SCALE <= scale <= MAX_SCALE:  # also catches NaN
        raise InputError(f"scale must be finite and at most {MAX_SCALE:.2g} in absolute value, got {scale}")
    return float(scale) if isinstance(scale, numbers.Real) else scale


# ------------------------------------------------------------------------------------------------------ autograd


class _Attention(torch.autograd.Function):
    """The autograd function around the registered operations.

    A call through it takes far less time than one through `torch.library.register_autograd`.
    """

    @staticmethod
    def forward(
        plain: bool,
        backend: str,
        query: Tensor,
        mirrored_query: Tensor | None,
        branches: int,
        key: Tensor,
        value: Tensor,
        options: Options,
    ) -> tuple[Tensor, ...]:
        queries = [query] if mirrored_query is None else [query, mirrored_query]
        run = _forward if plain else torch.ops.sgalign.attention
        return tuple(run(backend, queries, branches, key, value, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, ctx.backend, query, mirrored_query, branches, key, value, options = inputs
        tensors, ctx.numbers = options[:3], options[3:]
        outs, logsumexps = output[:branches], output[branches:]
        ctx.mark_non_differentiable(*logsumexps)
        ctx.set_materialize_grads(False)
        unused = [None] * (2 - branches)
        ctx.save_for_backward(query, mirrored_query, *outs, *unused, *logsumexps, *unused, key, value, *tensors)
        return outs

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, mirrored_grad_out = (*grad_outs, None)[:2]
        saved = ctx.saved_tensors
        _, _, out, mirrored_out = saved[:4]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if mirrored_out is None:
            mirrored_grad_out = None
        elif mirrored_grad_out is None:
            mirrored_grad_out = torch.zeros_like(mirrored_out)
        options = Options(*saved[-3:], *ctx.numbers)
        grads = _attention_gradients(ctx.backend, grad_out, mirrored_grad_out, *saved[:-3], options)
        *grad_queries, grad_key, grad_value = grads
        grad_query, mirrored_grad_query = (*grad_queries, None)[:2]
        return None, None, grad_query, mirrored_grad_query, None, grad_key, grad_value, None


def _gradients(
    backend: str,
    grad_out: Tensor,
    mirrored_grad_out: Tensor | None,
    query: Tensor,
    mirrored_query: Tensor | None,
    out: Tensor,
    mirrored_out: Tensor | None,
    logsumexp: Tensor,
    mirrored_logsumexp: Tensor | None,
    key: Tensor,
    value: Tensor,
    options: Options,
) -> tuple[Tensor, ...]:
    pairs = (grad_out, mirrored_grad_out), (query, mirrored_query), (out, mirrored_out), (logsumexp, mirrored_logsumexp)
    branches = [[tensor for tensor in pair if tensor is not None] for pair in pairs]
    plain = is_plain(grad_out, mirrored_grad_out, query, mirrored_query, key, value, *options[:3])
    run: Callable[..., Tensors] = _backward if plain else torch.ops.sgalign.attention_backward
    return tuple(run(backend, *branches, key, value, *options))


_attention_gradients = differentiable_once("fused attention", _gradients)


# ------------------------------------------------------------------------------------------------------ operations

_library = torch.library.Library("sgalign", "FRAGMENT")
# Returns the outputs of the branches, then their log-sum-exps.
_library.define(
    f"attention(str backend, Tensor[] queries, int branches, Tensor key, Tensor value, {OPTIONS_SCHEMA}) -> Tensor[]"
)
# Returns the gradients of the queries, of the key and of the value.
_library.define(
    "attention_backward(str backend, Tensor[] grad_outs, Tensor[] queries, Tensor[] outs, Tensor[] logsumexps,"
    f" Tensor key, Tensor value, {OPTIONS_SCHEMA}) -> Tensor[]"
)


def _empty_outputs(queries: Tensors, branches: int) -> tuple[Tensors, Tensors]:
    query = queries[0]
    batch, heads, length, _ = query.shape
    dtype = accumulated_dtype(query.dtype)
    outs = [empty_like(queries[min(branch, len(queries) - 1)]) for branch in range(branches)]
    return outs, [query.new_empty((batch, heads, length), dtype=dtype) for _ in range(branches)]


@torch.library.register_fake("sgalign::attention")
def _forward_fake(backend: str, queries: Tensors, branches: int, key: Tensor, value: Tensor, *options: Any) -> Tensors:
    outs, logsumexps = _empty_outputs([unit_stride(query) for query in queries], branches)
    return [*outs, *logsumexps]


@torch.library.register_fake("sgalign::attention_backward")
def _backward_fake(
    backend: str,
    grad_outs: Tensors,
    queries: Tensors,
    outs: Tensors,
    logsumexps: Tensors,
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> Tensors:
    return [empty_like(unit_stride(tensor)) for tensor in (*queries, key, value)]


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _forward(backend: str, queries: Tensors, branches: int, key: Tensor, value: Tensor, *options: Any) -> Tensors:
    queries, key, value = [unit_stride(query) for query in queries], unit_stride(key), unit_stride(value)
    outs, logsumexps = _empty_outputs(queries, branches)
    FORWARD[backend](Call(queries, key, value, outs, logsumexps, Options(*options)))
    return [*outs, *logsumexps]


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _backward(
    backend: str,
    grad_outs: Tensors,
    queries: Tensors,
    outs: Tensors,
    logsumexps: Tensors,
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> Tensors:
    queries, grad_outs = [unit_stride(query) for query in queries], [unit_stride(grad) for grad in grad_outs]
    key, value = unit_stride(key), unit_stride(value)
    grads = [empty_like(tensor) for tensor in (*queries, key, value)]
    BACKWARD[backend](Call(queries, key, value, outs, logsumexps, Options(*options)), grad_outs, grads)
    return grads
