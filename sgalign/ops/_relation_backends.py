"""The functions that launch the relation head, forward and backward, on each backend, and their arguments.

To add a backend, write a file of kernels and add an entry to `FORWARD` and to `BACKWARD`. backends.py lists the other
tables that need an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from sgalign.ops import _core, _cuda
from sgalign.ops._operands import DTYPES, Tensors

NO_LOGITS = (None, None)  # the backward pass needs no logits


class Branch(NamedTuple):
    """The operands of one branch, without `union` and `pairs`, which both branches share."""

    subject: Tensor  # [N, C]
    object: Tensor  # [N, C]
    weight: Tensor  # [K, C]
    bias: Tensor | None  # [K]

    def map(self, function: Callable[[Tensor], Tensor]) -> Branch:
        """Apply `function` to each operand and leave a bias of None as it is."""
        bias = None if self.bias is None else function(self.bias)
        return Branch(function(self.subject), function(self.object), function(self.weight), bias)


class Call(NamedTuple):
    """The input tensors of a forward pass, which its backward pass reads again.

    All last strides are 1. `pairs` is contiguous, and so are outputs and gradients.
    """

    union: Tensor
    pairs: Tensor
    branches: list[Branch]


class Gradients(NamedTuple):
    """The gradients of one branch. The gradient of the logits is an input, and the others are outputs."""

    logits: Tensor
    subject: Tensor
    object: Tensor
    weight: Tensor


def _forward_cpu(call: Call, logits: Tensors) -> None:
    core = _core.load()
    core.relation_forward(_description(core, call, logits))


def _forward_triton(call: Call, logits: Tensors) -> None:
    from sgalign.kernels import relation as kernels

    with _cuda.on(call.union.device):
        kernels.forward(*call, logits, _cuda.multiprocessors(call.union.device))


def _forward_cuda(call: Call, logits: Tensors) -> None:
    core, device = _cuda.core(call.union.device), call.union.device
    description = _description(core, call, logits)
    splits = core.cuda_relation_splits(description, _cuda.multiprocessors(device))
    workspace = _cuda.workspace(call.union, splits, len(call.branches), *logits[0].shape)
    with _cuda.on(device):
        core.cuda_relation_forward(description, splits, workspace.data_ptr(), _cuda.current_stream(device))


def _backward_cpu(call: Call, grads: list[Gradients], grad_union: Tensor | None) -> None:
    core = _core.load()
    core.relation_backward(_description(core, call, NO_LOGITS, grads, grad_union))


def _backward_triton(call: Call, grads: list[Gradients], grad_union: Tensor | None) -> None:
    from sgalign.kernels import relation as kernels

    with _cuda.on(call.union.device):
        kernels.backward(*call, grads, grad_union, _cuda.multiprocessors(call.union.device))


def _backward_cuda(call: Call, grads: list[Gradients], grad_union: Tensor | None) -> None:
    core = _cuda.core(call.union.device)
    description = _description(core, call, NO_LOGITS, grads, grad_union)
    orders = call.pairs.t().contiguous().argsort(dim=1, stable=True)
    with _cuda.on(call.union.device):
        core.cuda_relation_backward(description, orders.data_ptr(), _cuda.current_stream(call.union.device))


FORWARD: dict[str, Callable[[Call, Tensors], None]] = {
    "cpu": _forward_cpu,
    "triton": _forward_triton,
    "cuda": _forward_cuda,
}
BACKWARD: dict[str, Callable[[Call, list[Gradients], Tensor | None], None]] = {
    "cpu": _backward_cpu,
    "triton": _backward_triton,
    "cuda": _backward_cuda,
}


def _description(
    core: ModuleType,
    call: Call,
    logits: Sequence[Tensor | None],
    grads: Sequence[Gradients] = (),
    grad_union: Tensor | None = None,
) -> Any:
    """Return the call in the form that the core accepts (`relation_logits` in csrc/arguments.h).

    The result holds addresses, so the tensors must outlive it.
    """
    union, pairs, branches = call
    first = branches[0]
    numbers = [
        DTYPES.index(union.dtype),
        first.subject.shape[0],
        first.weight.shape[0],
        *union.shape,
        union.data_ptr(),
        union.stride()[0],
        pairs.data_ptr(),
        _core.threads(),
        len(branches),
    ]
    for (subject, object, weight, bias), out in zip(branches, logits):
        for matrix in (subject, object, weight):
            numbers += matrix.data_ptr(), matrix.stride()[0]
        numbers += _address(bias), _address(out)
    if grads:
        numbers += [tensor.data_ptr() for of_branch in grads for tensor in of_branch]
        numbers.append(_address(grad_union))
    return core.RelationLogits(*numbers)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
