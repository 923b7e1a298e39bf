"""The functions that launch attention, forward and backward, on each backend, and the arguments that they take.

To add a backend, write a file of kernels and add an entry to `FORWARD` and to `BACKWARD`. backends.py lists the other
tables that need an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.ops import _core, _cuda
from sgalign.ops._operands import DTYPES, Tensors
from sgalign.ops.random_mask import STEPS

NO_MASK, NO_PADDING = (0,) * 5, (0,) * 3  # passed in place of the address and the strides of a missing mask


class Options(NamedTuple):
    """The options of a call in the order of `OPTIONS_SCHEMA`: all arguments except queries, keys and values."""

    mask: Tensor | None  # bool [B, H, Lq, Lk], with stride 0 along broadcast dimensions
    key_padding_mask: Tensor | None
    seed: Tensor | None  # None if nothing is drawn
    mask_threshold: int  # drop probability of the random mask times 65536
    dropout_threshold: int  # drop probability of dropout times 65536
    stream: int  # stream of the random mask
    scale: float  # factor of the scores

    @property
    def dropout_scale(self) -> float:
        """The factor of the weights that dropout keeps."""
        return STEPS / (STEPS - self.dropout_threshold) if self.dropout_threshold < STEPS else 0.0


# part of the schemas of the registered operations
OPTIONS_SCHEMA = (
    "Tensor? mask, Tensor? key_padding_mask, Tensor? seed, int mask_threshold, int dropout_threshold, int stream,"
    " float scale"
)


class Call(NamedTuple):
    """The tensors and options of a forward pass, which its backward pass reads again.

    All last strides are 1. With one output there is one branch, which has the random mask. With two outputs, the first
    belongs to the supervised branch and the second to the mirrored branch, and only the mirrored branch has the random
    mask. Both branches may share one query.
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
    """Return the call in the form that the core accepts (`attention` in csrc/bindings.cpp).

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
        *options[3:],
        torch.get_num_threads(),
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
