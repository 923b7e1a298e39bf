"""Masked attention, for one branch or for a supervised and a mirrored one in a single pass over the keys.

From the public function to the kernel: `fused_masked_attention` checks its arguments and calls `_Attention` (autograd),
which calls the registered operation ``sgalign::attention`` (fake implementation, torch.compile), which calls the
backend's kernels. Both public functions are the same operation on one or two branches.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops.random_mask import check_stream, dropout_scale, ratio_threshold, seed_tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of csrc/kernels.h
MAX_DIM = 256
MAX_SCALE = torch.finfo(torch.float32).max / 2  # the kernels multiply it by log2(e)
Settings = tuple[int, int, int, float]  # mask threshold, dropout threshold, stream, scale


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
    """Attention whose entries are dropped *before* the softmax at random, by a mask that is never stored.

    ``S = scale * Q K^T``; an entry is dropped by `mask`, by `key_padding_mask` or, with probability `mask_ratio`, at
    random; ``out = softmax over what is kept, times V``. The random mask is not dropout: what is kept is a softmax
    again, and nothing is rescaled by ``1 / (1 - mask_ratio)``. A row with nothing kept gives zeros and zero gradients.
    This is the masking of the mirrored branch of Xu, Liao and Sigal, "Self-Supervised Relation Alignment for Scene
    Graph Generation", WACV 2024.

    The backward pass draws the same mask again from the seed, is deterministic, and keeps only ``out`` and one number
    a row. It is differentiable once in query, key and value.

    Args:
        query: ``[B, H, Lq, D]``, float32, float64, bfloat16 or float16; D at most 256.
        key, value: ``[B, H, Lk, D]`` of the query's dtype and device. Any strides; copied if the last is not 1.
        mask: bool, broadcastable to ``[B, H, Lq, Lk]``, True = dropped.
        mask_ratio: probability of the random mask, in [0, 1], rounded to a multiple of 1/65536.
        mask_seed: int or int64 scalar tensor on the query's device. None draws one from torch's generator, so that
            `torch.manual_seed` reproduces it; it is drawn only if `mask_ratio` or `dropout_p` is positive.
        mask_stream: in [0, 2**31), tells apart the attention blocks that share a seed.
        key_padding_mask: bool ``[B, Lk]``, True = ignored, as in `torch.nn.MultiheadAttention`. Whatever such keys and
            values hold, NaN too, has no effect.
        dropout_p: ordinary dropout of the softmax, in [0, 1], rescaled by ``1 / (1 - dropout_p)``, from the same seed.
        scale: of the scores; None means ``1 / sqrt(D)``.
        backend: "cpu" (compiled), "triton" or "cuda" (GPUs), "reference" (plain PyTorch); None takes the fastest that
            serves device and dtype.

    Returns:
        ``[B, H, Lq, D]`` in the query's dtype, with the query's memory order.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.
        ImportError: the compiled core is not built, or older than its sources.

    Under autocast the inputs are cast as for `torch.nn.functional.scaled_dot_product_attention`.
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
    """The supervised and the mirrored branch of relation alignment in one pass over keys and values.

    ``out`` is `fused_masked_attention` of `query` without the random mask, ``mirrored_out`` of `mirrored_query` with
    it. `mask`, `key_padding_mask` and the dropout noise are the same in both, so that the random mask is the only
    difference between the branches. If `mirrored_query` *is* `query` (the same tensor object, as in a decoder's first
    layer), scores and exponentials are computed once.

    Args:
        query, mirrored_query: ``[B, H, Lq, D]``.
        key, value: ``[B, H, Lk, D]``.
        mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend: as in
            `fused_masked_attention`.

    Returns:
        ``(out, mirrored_out)``, each ``[B, H, Lq, D]``.

    Raises:
        As `fused_masked_attention`.
    """
    queries = [query] if mirrored_query is query else [query, mirrored_query]
    out, mirrored_out = _attention(
        queries, 2, key, value, mask, mask_ratio, mask_seed, mask_stream, key_padding_mask, dropout_p, scale, backend
    )
    return out, mirrored_out


def _attention(
    queries: list[Tensor],
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
    """The outputs of one or two branches; the random mask applies to the last. One query may serve both."""
    _check_tensors(queries, key, value, mask, key_padding_mask)
    query = queries[0]
    mask_threshold = ratio_threshold(mask_ratio, "mask_ratio")
    dropout_threshold = ratio_threshold(dropout_p, "dropout_p")
    check_stream(mask_stream, "mask_stream")
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    elif isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    elif not -MAX_SCALE <= scale <= MAX_SCALE:  # also catches NaN
        raise InputError(f"scale must be finite and at most {MAX_SCALE:.2g} in size, got {scale}")
    elif isinstance(scale, numbers.Real):
        scale = float(scale)
    dtype = computed_dtype(query)
    backend = backends.choose(backend, query.device, dtype)
    queries, key, value = [q.to(dtype) for q in queries], key.to(dtype), value.to(dtype)
    seed = None
    if mask_threshold or dropout_threshold:
        seed = seed_tensor(mask_seed, query.device, "mask_seed")
    settings = (mask_threshold, dropout_threshold, mask_stream, scale)
    if backend == "reference":
        return _reference(queries, branches, key, value, mask, key_padding_mask, seed, settings)
    if mask is not None:
        mask = mask.expand(*query.shape[:3], key.shape[2])
    query, key, value, *mirrored_query = distinct([queries[0], key, value, *queries[1:]])
    operands = query, *(mirrored_query or [None]), branches, key, value, mask, key_padding_mask, seed, settings
    return _Attention.apply(backend, *operands)[:branches]


def _check_tensors(
    queries: list[Tensor], key: Tensor, value: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None
) -> None:
    names = ["query", "mirrored_query"][: len(queries)] + ["key", "value"]
    tensors = [*queries, key, value]
    for name, tensor in zip(names, tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.dim() != 4:
            raise InputError(f"{name} must be [B, H, L, D], got {tensor.dim()} dimensions: {list(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    query = queries[0]
    batch, heads, length, dim = query.shape
    keys = key.shape[2]
    expected = {"mirrored_query": (batch, heads, length, dim), "key": (batch, heads, keys, dim)}
    expected["value"] = expected["key"]
    for name, tensor in zip(names[1:], tensors[1:]):
        if tensor.shape != expected[name]:
            raise InputError(
                f"{name} must be {list(expected[name])} to go with query {list(query.shape)}"
                f"{' and key ' + str(list(key.shape)) if name == 'value' else ''}, got {list(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise InputError(f"{name} must be on the query's device {query.device}, got {tensor.device}")
        if computed_dtype(tensor) != computed_dtype(query):
            raise TypeError(f"{name} must have the query's dtype {query.dtype}, got {tensor.dtype}")
    if dim > MAX_DIM:
        raise InputError(f"query must have at most {MAX_DIM} channels a head (D), got {dim}")
    for name, boolean, shape in (
        ("mask", mask, (batch, heads, length, keys)),
        ("key_padding_mask", key_padding_mask, (batch, keys)),
    ):
        if boolean is None:
            continue
        if not isinstance(boolean, Tensor) or boolean.dtype != torch.bool:
            got = boolean.dtype if isinstance(boolean, Tensor) else type(boolean).__name__
            raise TypeError(f"{name} must be a bool tensor, True = dropped, got {got}")
        check_dense(name, boolean)
        if boolean.device != query.device:
            raise InputError(f"{name} must be on the query's device {query.device}, got {boolean.device}")
        if name == "mask":
            fits = boolean.dim() <= 4 and all(size in (1, full) for size, full in zip(boolean.shape[::-1], shape[::-1]))
        else:
            fits = boolean.shape == shape
        if not fits:
            how = "broadcastable to" if name == "mask" else "of shape"
            raise InputError(f"{name} must be {how} {list(shape)}, got {list(boolean.shape)}")


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if tensor.is_nested else tensor.layout}")


def distinct(tensors: list[Any]) -> list[Any]:
    """Tensors and None, with views for those that come again: torch.compile gives a Function no tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return found


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's own, or what autocast makes of it."""
    device = tensor.device.type
    # torch.is_autocast_enabled knows no meta tensors.
    if tensor.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def _reference(
    queries: list[Tensor],
    branches: int,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, ...]:
    """Materialises the masks and calls `reference.attention` for each branch."""
    batch, heads, length, _ = queries[0].shape
    mask_threshold, dropout_threshold, stream, scale = settings

    def draw(threshold: int, stream: int) -> Tensor:
        assert seed is not None
        random = reference.random_mask(
            batch * heads, length, key.shape[2], threshold=threshold, seed=seed, stream=stream, device=key.device
        )
        return random.view(batch, heads, length, key.shape[2])

    dropout_keep = ~draw(dropout_threshold, stream | reference.DROPOUT_STREAM_BIT) if dropout_threshold else None
    outs = []
    for branch in range(branches):
        dropped = mask
        if branch == branches - 1 and mask_threshold:
            random = draw(mask_threshold, stream)
            dropped = random if mask is None else mask | random
        outs.append(
            reference.attention(
                queries[min(branch, len(queries) - 1)],
                key,
                value,
                dropped=dropped,
                key_padding_mask=key_padding_mask,
                dropout_keep=dropout_keep,
                dropout_scale=dropout_scale(dropout_threshold),
                scale=scale,
            )
        )
    return tuple(outs)


class _Attention(torch.autograd.Function):
    """Autograd over the registered operations: far cheaper a call than `torch.library.register_autograd`."""

    @staticmethod
    def forward(
        backend: str,
        query: Tensor,
        mirrored_query: Tensor | None,
        branches: int,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        queries = [query] if mirrored_query is None else [query, mirrored_query]
        operation = torch.ops.sgalign.attention
        return tuple(operation(backend, queries, branches, key, value, mask, key_padding_mask, seed, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, query, mirrored_query, branches, *options, ctx.settings = inputs
        outs, log_sums = output[:branches], output[branches:]
        ctx.mark_non_differentiable(*log_sums)
        ctx.set_materialize_grads(False)
        unused = [None] * (2 - branches)
        ctx.save_for_backward(query, mirrored_query, *outs, *unused, *log_sums, *unused, *options)

    @staticmethod
    def backward(ctx: Any, *grad_outs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, mirrored_grad_out = (*grad_outs, None)[:2]
        query, mirrored_query, out, mirrored_out, *rest = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if mirrored_out is None:
            mirrored_grad_out = None
        elif mirrored_grad_out is None:
            mirrored_grad_out = torch.zeros_like(mirrored_out)
        grads = _AttentionBackward.apply(
            ctx.backend, grad_out, mirrored_grad_out, query, mirrored_query, out, mirrored_out, *rest, ctx.settings
        )
        *grad_queries, grad_key, grad_value = grads
        grad_query, mirrored_grad_query = (*grad_queries, None)[:2]
        return None, grad_query, mirrored_grad_query, None, grad_key, grad_value, None, None, None, None


class _AttentionBackward(torch.autograd.Function):
    """The backward operation, which cannot be differentiated again, and says so."""

    @staticmethod
    def forward(
        backend: str,
        grad_out: Tensor,
        mirrored_grad_out: Tensor | None,
        query: Tensor,
        mirrored_query: Tensor | None,
        out: Tensor,
        mirrored_out: Tensor | None,
        log_sum: Tensor,
        mirrored_log_sum: Tensor | None,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        pairs = (grad_out, mirrored_grad_out), (query, mirrored_query), (out, mirrored_out), (log_sum, mirrored_log_sum)
        branches = [[tensor for tensor in pair if tensor is not None] for pair in pairs]
        operation = torch.ops.sgalign.attention_backward
        return tuple(operation(backend, *branches, key, value, mask, key_padding_mask, seed, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "sgalign: second-order gradients of fused attention are not supported (create_graph=True, or a gradient of"
            " a gradient); backend='reference' has them"
        )


_OPTIONS = (
    "Tensor? mask, Tensor? key_padding_mask, Tensor? seed, int mask_threshold, int dropout_threshold, int stream,"
    " float scale"
)
_library = torch.library.Library("sgalign", "FRAGMENT")
# -> the branches' outputs, then their log sums
_library.define(
    f"attention(str backend, Tensor[] queries, int branches, Tensor key, Tensor value, {_OPTIONS}) -> Tensor[]"
)
# -> the gradients of the queries, of key and of value
_library.define(
    "attention_backward(str backend, Tensor[] grad_outs, Tensor[] queries, Tensor[] outs, Tensor[] log_sums,"
    f" Tensor key, Tensor value, {_OPTIONS}) -> Tensor[]"
)


def _empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised, with unit last stride, and if it can be the tensor's memory order.

    The order of a ``[B, L, H * D]`` projection survives, so that the way back to it needs no copy.
    """
    out = torch.empty_like(tensor)
    # Of a tensor that overlaps itself empty_like makes an order of its own.
    return out if out.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_outputs(queries: list[Tensor], branches: int) -> tuple[list[Tensor], list[Tensor]]:
    query = queries[0]
    outs = [_empty_like(queries[min(branch, len(queries) - 1)]) for branch in range(branches)]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return outs, [query.new_empty(query.shape[:3], dtype=dtype) for _ in range(branches)]


@torch.library.register_fake("sgalign::attention")
def _attention_fake(
    backend: str, queries: list[Tensor], branches: int, key: Tensor, value: Tensor, *options: Any
) -> list[Tensor]:
    outs, log_sums = _empty_outputs([unit_stride(query) for query in queries], branches)
    return [*outs, *log_sums]


@torch.library.register_fake("sgalign::attention_backward")
def _attention_backward_fake(
    backend: str,
    grad_outs: list[Tensor],
    queries: list[Tensor],
    outs: list[Tensor],
    log_sums: list[Tensor],
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> list[Tensor]:
    return [_empty_like(unit_stride(tensor)) for tensor in (*queries, key, value)]


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention_forward(
    backend: str, queries: list[Tensor], branches: int, key: Tensor, value: Tensor, *options: Any
) -> list[Tensor]:
    queries = [unit_stride(query) for query in queries]
    key, value = unit_stride(key), unit_stride(value)
    outs, log_sums = _empty_outputs(queries, branches)
    if backend == "triton":
        from sgalign.kernels import attention as kernels

        with _cuda.queue(key.device):
            kernels.forward(queries, key, value, outs, log_sums, *options)
        return [*outs, *log_sums]
    core = _cuda.core(key.device) if backend == "cuda" else _core.load()
    description = _description(_groups(queries, outs, log_sums), queries[0], key, value, *options)
    if backend == "cuda":
        splits = core.cuda_attention_splits(description, _cuda.multiprocessors(key.device))
        parts = [splits, len(outs), *queries[0].shape[:3], key.shape[3] + 1] if splits > 1 else [0]
        workspace = _cuda.workspace(key, *parts)
        with _cuda.queue(key.device) as queue:
            core.cuda_attention_forward(description, _seed_address(*options), splits, workspace.data_ptr(), queue)
    else:
        core.attention_forward(description)
    return [*outs, *log_sums]


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    backend: str,
    grad_outs: list[Tensor],
    queries: list[Tensor],
    outs: list[Tensor],
    log_sums: list[Tensor],
    key: Tensor,
    value: Tensor,
    *options: Any,
) -> list[Tensor]:
    queries, grad_outs = [unit_stride(query) for query in queries], [unit_stride(grad) for grad in grad_outs]
    key, value = unit_stride(key), unit_stride(value)
    grads = [_empty_like(tensor) for tensor in (*queries, key, value)]
    if backend == "triton":
        from sgalign.kernels import attention as kernels

        with _cuda.queue(key.device):
            kernels.backward(grad_outs, queries, outs, log_sums, key, value, grads, *options)
        return grads
    core = _cuda.core(key.device) if backend == "cuda" else _core.load()
    groups = _groups(queries, outs, log_sums, grad_outs, grads)
    description = _description(groups, queries[0], key, value, *options)
    grad_key, grad_value = _matrix(grads[-2]), _matrix(grads[-1])
    if backend == "cuda":
        splits = core.cuda_attention_splits(description, _cuda.multiprocessors(key.device))
        parts = splits * sum(query.numel() for query in queries) if splits > 1 else 0
        workspace = _cuda.workspace(key, sum(log_sum.numel() for log_sum in log_sums) + parts)
        with _cuda.queue(key.device) as queue:
            core.cuda_attention_backward(
                description, grad_key, grad_value, _seed_address(*options), splits, workspace.data_ptr(), queue
            )
    else:
        core.attention_backward(description, grad_key, grad_value)
    return grads


def unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _matrix(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.stride()


def _groups(
    queries: list[Tensor],
    outs: list[Tensor],
    log_sums: list[Tensor],
    grad_outs: list[Tensor] | None = None,
    grad_queries: list[Tensor] | None = None,
) -> list[tuple[Any, ...]]:
    """Query groups as csrc/bindings.cpp takes them: two branches share one query, or each has its own."""
    branches = [
        (
            _matrix(out),
            log_sums[i].data_ptr(),
            i == len(outs) - 1,
            None if grad_outs is None else _matrix(grad_outs[i]),
        )
        for i, out in enumerate(outs)
    ]
    return [
        (
            _matrix(query),
            branches if len(queries) == 1 else [branches[i]],
            None if grad_queries is None else _matrix(grad_queries[i]),
        )
        for i, query in enumerate(queries)
    ]


def _seed_address(mask: Tensor | None, key_padding_mask: Tensor | None, seed: Tensor | None, *settings: Any) -> int:
    return 0 if seed is None else seed.data_ptr()


def _description(
    groups: list[tuple[Any, ...]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    mask_threshold: int,
    dropout_threshold: int,
    stream: int,
    scale: float,
) -> Any:
    """The call as the core takes it (csrc/kernels.h). It holds addresses: the tensors must outlive it."""
    return _core.load().Attention(
        DTYPES.index(key.dtype),
        (*query.shape[:3], *key.shape[2:]),
        groups,
        _matrix(key),
        _matrix(value),
        None if mask is None else _matrix(mask),
        None if key_padding_mask is None else _matrix(key_padding_mask),
        0 if seed is None or seed.device.type != "cpu" else seed.item(),  # a GPU reads it itself
        stream,
        mask_threshold,
        dropout_threshold,
        scale,
        torch.get_num_threads(),
    )
