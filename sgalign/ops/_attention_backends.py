"""The functions that compute attention, forward and backward, on each backend, and the arguments that they take.

To add a backend, write a file of kernels and add an entry to `FORWARD` and to `BACKWARD`. backends.py lists the other
tables that need an entry. The backend "reference" launches no kernels. Its functions are at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from sgalign.ops import _core, _cuda, reference
from sgalign.ops._attention_arguments import Options, scale_for
from sgalign.ops._operands import DTYPES, Tensors, accumulated_dtype, cast, without_autocast

NO_MASK, NO_PADDING = (0,) * 5, (0,) * 3  # passed in place of the address and the strides of a missing mask


class Call(NamedTuple):
    """The tensors and options of a forward pass, which its backward pass reads again.

    All last strides are 1. `options.mask` is [B, H, Lq, Lk], with stride 0 along broadcast dimensions. `options.scale`
    is a number. With one output there is one branch, which has the random mask. With two outputs, the first belongs to
    the supervised branch and the second to the mirrored branch, and only the mirrored branch has the random mask. Both
    branches may share one query.
    """

    queries: Tensors
    key: Tensor
    value: Tensor
    outs: Tensors
    logsumexps: Tensors  # [B, H, Lq], in units of log2
    options: Options


# ------------------------------------------------------------------------------------------------------ forward


def _forward_cpu(call: Call) -> None:
    core = _core.load()
    core.attention_forward(_description(core, call))


def _forward_triton(call: Call) -> None:
    from sgalign.kernels import attention as kernels

    with _cuda.on(call.key.device):
        kernels.forward(*call, multiprocessors=_cuda.multiprocessors(call.key.device))


def _forward_cuda(call: Call) -> None:
    core, device = _cuda.core(call.key.device), call.key.device
    description = _description(core, call)
    splits = core.cuda_attention_splits(description, _cuda.multiprocessors(device))
    parts = [splits, len(call.outs), *call.queries[0].shape[:3], call.key.shape[3] + 1] if splits > 1 else [0]
    workspace = _cuda.workspace(call.key, *parts)
    with _cuda.on(device):
        stream = _cuda.current_stream(device)
        core.cuda_attention_forward(description, _seed_address(call), splits, workspace.data_ptr(), stream)


FORWARD: dict[str, Callable[[Call], None]] = {
    "cpu": _forward_cpu,
    "triton": _forward_triton,
    "cuda": _forward_cuda,
}


# ------------------------------------------------------------------------------------------------------ backward
# These functions write `grads`: the gradients of the queries, of the key and of the value.


def _backward_cpu(call: Call, grad_outs: Tensors, grads: Tensors) -> None:
    core = _core.load()
    core.attention_backward(_description(core, call, grad_outs, grads))


def _backward_triton(call: Call, grad_outs: Tensors, grads: Tensors) -> None:
    from sgalign.kernels import attention as kernels

    with _cuda.on(call.key.device):
        kernels.backward(grad_outs, grads, *call, multiprocessors=_cuda.multiprocessors(call.key.device))


def _backward_cuda(call: Call, grad_outs: Tensors, grads: Tensors) -> None:
    core, device = _cuda.core(call.key.device), call.key.device
    description = _description(core, call, grad_outs, grads)
    splits = core.cuda_attention_splits(description, _cuda.multiprocessors(device))
    parts = splits * sum(query.numel() for query in call.queries) if splits > 1 else 0
    workspace = _cuda.workspace(call.key, sum(logsumexp.numel() for logsumexp in call.logsumexps) + parts)
    with _cuda.on(device):
        stream = _cuda.current_stream(device)
        core.cuda_attention_backward(description, _seed_address(call), splits, workspace.data_ptr(), stream)


BACKWARD: dict[str, Callable[[Call, Tensors, Tensors], None]] = {
    "cpu": _backward_cpu,
    "triton": _backward_triton,
    "cuda": _backward_cuda,
}


# ------------------------------------------------------------------------------------------------------ compiled core


def _description(core: ModuleType, call: Call, grad_outs: Sequence[Tensor] = (), grads: Sequence[Tensor] = ()) -> Any:
    """Return the call in the form that the core accepts (`attention` in csrc/arguments.h).

    The result holds addresses, so the tensors must outlive it.
    """
    queries, key, value, outs, logsumexps, options = call
    seed = options.seed
    numbers = [
        DTYPES.index(key.dtype),
        *queries[0].shape,
        key.shape[2],
        *_matrix(key),
        *_matrix(value),
        *(NO_MASK if options.mask is None else _matrix(options.mask)),
        *(NO_PADDING if options.key_padding_mask is None else _matrix(options.key_padding_mask)),
        seed.item() if seed is not None and seed.is_cpu else 0,  # kernels on a GPU read the seed from its memory
        options.mask_threshold,
        options.dropout_threshold,
        options.stream,
        options.scale,
        _core.threads(),
        len(outs),
        len(queries),
    ]
    for query in queries:
        numbers += _matrix(query)
    for out, logsumexp in zip(outs, logsumexps):
        numbers += _matrix(out)
        numbers.append(logsumexp.data_ptr())
    for grad in (*grad_outs, *grads):
        numbers += _matrix(grad)
    return core.Attention(*numbers)


def _matrix(tensor: Tensor) -> tuple[int, ...]:
    """Return the address and the strides of a tensor."""
    return (tensor.data_ptr(), *tensor.stride())


def _seed_address(call: Call) -> int:
    return 0 if call.options.seed is None else call.options.seed.data_ptr()


# ------------------------------------------------------------------------------------------------------ reference
# Autograd can differentiate these functions any number of times. Like the kernels, they compute in float32 or float64,
# because scores may exceed 65504, the largest float16 number.


def reference_attention(
    queries: Tensors, branches: int, key: Tensor, value: Tensor, options: Options
) -> tuple[Tensor, ...]:
    """Return the outputs of one or two branches, with the random mask in the last branch."""
    shared = _shared_arguments(queries[0], key, options)
    dropped = [options.mask] * (branches - 1) + [_dropped(queries[0], key, options)]
    value = cast(value, accumulated_dtype(value.dtype))
    queries = [cast(query, value.dtype) for query in queries]
    with without_autocast(key.device):
        outs = [
            reference.attention(queries[min(branch, len(queries) - 1)], value=value, dropped=dropped[branch], **shared)
            for branch in range(branches)
        ]
    return tuple(cast(out, key.dtype) for out in outs)


def reference_weights(query: Tensor, key: Tensor, options: Options) -> Tensor:
    """Return the weights of one branch with the random mask."""
    shared, dropped = _shared_arguments(query, key, options), _dropped(query, key, options)
    with without_autocast(key.device):
        weights = reference.attention_weights(cast(query, shared["key"].dtype), dropped=dropped, **shared)
    return cast(weights, key.dtype)


def _shared_arguments(query: Tensor, key: Tensor, options: Options) -> dict[str, Any]:
    """Return the arguments of `reference.attention_weights` that are the same for both branches."""
    dropout_keep = None
    if options.dropout_threshold:
        stream = options.stream | reference.DROPOUT_STREAM_BIT
        dropout_keep = ~_draw(query, key, options, options.dropout_threshold, stream)
    return {
        "key": cast(key, accumulated_dtype(key.dtype)),
        "key_padding_mask": options.key_padding_mask,
        "dropout_keep": dropout_keep,
        "dropout_scale": options.dropout_scale,
        "scale": scale_for(query.shape[3], options.scale),
    }


def _dropped(query: Tensor, key: Tensor, options: Options) -> Tensor | None:
    """Return the entries that the explicit mask or the random mask drops."""
    if not options.mask_threshold:
        return options.mask
    random = _draw(query, key, options, options.mask_threshold, options.stream)
    return random if options.mask is None else options.mask | random


def _draw(query: Tensor, key: Tensor, options: Options, threshold: int, stream: int) -> Tensor:
    (batch, heads, length, _), keys, seed = query.shape, key.shape[2], options.seed
    assert seed is not None
    size = batch * heads, length, keys
    random = reference.random_mask(*size, threshold=threshold, seed=seed, stream=stream, device=key.device)
    return random.view(batch, heads, length, keys)
