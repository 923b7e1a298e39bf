"""Masked attention for one branch, or for a supervised and a mirrored branch in one pass over the keys.

`fused_masked_attention` and `dual_branch_attention` run the same operation, on one or two branches. A call goes through
these steps:

1. The public function checks its arguments with `prepare` (_attention_arguments.py) and calls `_attend`.
2. `_attend` calls `_Attention` (autograd), which calls the implementation `_forward`. If torch's dispatcher has
   something to add (_autograd.py), `_attend` calls the registered operation ``sgalign::attention`` instead, and the
   dispatcher calls `_Attention`.
3. `_forward` allocates the outputs and calls the backend's launch function from the table `FORWARD` in
   _attention_backends.py.

The gradients take the same steps: `_Attention.backward`, then ``sgalign::attention_backward`` or `_backward`, then the
table `BACKWARD`. `attention_weights` and the backend "reference" use plain PyTorch (the end of _attention_backends.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgalign.ops._attention_arguments import OPTIONS_SCHEMA, Options, Prepared, prepare, scale_for
from sgalign.ops._attention_backends import BACKWARD, FORWARD, Call, reference_attention, reference_weights
from sgalign.ops._autograd import call, differentiable_once, is_plain, is_transformed, no_second_order, no_vmap
from sgalign.ops._operands import Tensors, accumulated_dtype, empty_like, unit_stride
from sgalign.ops._registration import operation, register

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
    prepared = prepare(
        [query], key, value, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend
    )
    return _attend(1, prepared)[0]


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
    prepared = prepare(
        queries, key, value, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend
    )
    out, mirrored_out = _attend(2, prepared)
    return out, mirrored_out


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    mask_ratio: float = 0.0,
    mask_seed: int | Tensor | None = None,
    mask_stream: int = 0,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Return the weights that `fused_masked_attention` multiplies with the values, as a tensor.

    The fused kernels never store these weights. This function computes them in plain PyTorch, for figures and for code
    that reads them. To get the weights of a call of `fused_masked_attention`, pass the same arguments and the same
    `mask_seed`. The output of that call is ``weights @ value``, up to rounding. This function is differentiable any
    number of times.

    Args:
        query: the queries, ``[B, H, Lq, D]``.
        key: the keys, ``[B, H, Lk, D]``.
        mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale: as in `fused_masked_attention`.

    Returns:
        The weights, ``[B, H, Lq, Lk]``, in the query's dtype or autocast's. They are 0 for dropped entries. Without
        dropout, each row with a kept entry sums to 1.

    Raises:
        TypeError, ValueError: as in `fused_masked_attention`.
    """
    prepared = prepare(
        [query], key, key, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, "reference"
    )
    return reference_weights(prepared.queries[0], prepared.key, prepared.options)


def _attend(branches: int, prepared: Prepared) -> tuple[Tensor, ...]:
    """Return the outputs of one or two branches.

    Two branches may share one query. The random mask applies to the last branch.
    """
    plain, backend, queries, key, value, options = prepared
    if backend == "reference":
        return reference_attention(queries, branches, key, value, options)
    if plain or is_transformed():
        query, mirrored_query = (*queries, None)[:2]
        outputs = call(_Attention, plain, backend, query, mirrored_query, branches, key, value, options)
    else:
        outputs = operation("attention", plain)(backend, queries, branches, key, value, *options)
    return tuple(outputs[:branches])


# ------------------------------------------------------------------------------------------------------ autograd


class _Attention(torch.autograd.Function):
    """The autograd function around the operations.

    Plain calls use it directly, which takes far less time than a call through `torch.library.register_autograd`. So do
    calls inside function transforms. For other calls, torch's dispatcher uses it.
    """

    vmap = staticmethod(no_vmap("fused attention"))

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
        run = operation("attention", plain)
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
    run = operation("attention_backward", plain)
    return tuple(run(backend, *branches, key, value, *options))


_attention_gradients = differentiable_once("fused attention", _gradients)


# ------------------------------------------------------------------------------------------------------ operations


def _empty_outputs(queries: Tensors, branches: int) -> tuple[Tensors, Tensors]:
    query = queries[0]
    batch, heads, length, _ = query.shape
    dtype = accumulated_dtype(query.dtype)
    outs = [empty_like(queries[min(branch, len(queries) - 1)]) for branch in range(branches)]
    return outs, [query.new_empty((batch, heads, length), dtype=dtype) for _ in range(branches)]


def _forward_fake(backend: str, queries: Tensors, branches: int, key: Tensor, value: Tensor, *options: Any) -> Tensors:
    outs, logsumexps = _empty_outputs([unit_stride(query) for query in queries], branches)
    return [*outs, *logsumexps]


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


def _forward(backend: str, queries: Tensors, branches: int, key: Tensor, value: Tensor, *options: Any) -> Tensors:
    queries = [unit_stride(query) for query in queries]
    outs, logsumexps = _empty_outputs(queries, branches)
    FORWARD[backend](_dense_call(queries, key, value, outs, logsumexps, options))
    return [*outs, *logsumexps]


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
    queries = [unit_stride(query) for query in queries]
    dense = _dense_call(queries, key, value, outs, logsumexps, options)
    grads = [empty_like(tensor) for tensor in (*queries, dense.key, dense.value)]
    BACKWARD[backend](dense, [unit_stride(grad) for grad in grad_outs], grads)
    return grads


def _dense_call(
    queries: Tensors, key: Tensor, value: Tensor, outs: Tensors, logsumexps: Tensors, options: tuple[Any, ...]
) -> Call:
    """Return the call for a launch function. `options` are the fields of `Options`."""
    # The mask is broadcast here, not before autograd. The backward therefore saves it in the size it was given. The
    # scale is computed here, because torch.compile would compile again for every number of channels.
    mask, padding, seed, mask_ratio, dropout_p, stream, scale = options
    batch, heads, length, dim = queries[0].shape
    mask = None if mask is None else mask.expand(batch, heads, length, key.shape[2])
    dense = Options(mask, padding, seed, mask_ratio, dropout_p, stream, scale_for(dim, scale))
    return Call(queries, unit_stride(key), unit_stride(value), outs, logsumexps, dense)


def _with_autograd(backend: str, queries: Tensors, branches: int, key: Tensor, value: Tensor, *options: Any) -> Tensors:
    query, mirrored_query = (*queries, None)[:2]
    return list(_Attention.apply(False, backend, query, mirrored_query, branches, key, value, Options(*options)))


def _flops(backend: str, queries: Any, branches: int, key: Any, value: Any, *options: Any, out_shape: Any) -> int:
    """Count the floating-point operations: a product for the scores of each query, and one for each branch's output."""
    batch, heads, length, dim = queries[0]
    return (len(queries) + branches) * 2 * batch * heads * length * key[2] * dim


def _backward_flops(
    backend: str, grad_outs: Any, queries: Any, outs: Any, logsumexps: Any, key: Any, *others: Any, out_shape: Any
) -> int:
    """Count the floating-point operations of five products for each branch, as torch does for its own attention."""
    batch, heads, length, dim = queries[0]
    return 5 * len(grad_outs) * 2 * batch * heads * length * key[2] * dim


# Returns the outputs of the branches, then their log-sum-exps.
register(
    f"attention(str backend, Tensor[] queries, int branches, Tensor key, Tensor value, {OPTIONS_SCHEMA}) -> Tensor[]",
    _forward,
    _forward_fake,
    _with_autograd,
    _flops,
)
# Returns the gradients of the queries, of the key and of the value.
register(
    "attention_backward(str backend, Tensor[] grad_outs, Tensor[] queries, Tensor[] outs, Tensor[] logsumexps,"
    f" Tensor key, Tensor value, {OPTIONS_SCHEMA}) -> Tensor[]",
    _backward,
    _backward_fake,
    no_second_order("fused attention"),
    _backward_flops,
)
