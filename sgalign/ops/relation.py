"""The relation head of Neural Motifs, for one branch or for both in a single pass over the union features.

From the public function to the kernel as in `sgalign.ops.attention`: checks, `_RelationLogits` (autograd), the
registered operation ``sgalign::relation_logits`` or its implementation `_forward`, and the backend's launch function
from the table `_FORWARD`: the compiled core (csrc/cpu/relation.cpp, csrc/cuda/relation.cu) or Triton's kernels
(kernels/relation.py). The gradients take the same way to `_BACKWARD`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops._autograd import call, differentiable_once, distinct, is_plain
from sgalign.ops._operands import (
    DTYPES,
    Tensors,
    cast,
    check_dense,
    check_device,
    check_dtype,
    check_floating,
    check_tensor,
    computed_dtype,
    once_a_signature,
    unit_stride,
)


class Branch(NamedTuple):
    """The operands of one branch; `union` and `pairs` belong to both."""

    subject: Tensor  # [N, C]
    object: Tensor  # [N, C]
    weight: Tensor  # [K, C]
    bias: Tensor | None  # [K]

    def map(self, function: Callable[[Tensor], Tensor]) -> Branch:
        """Return the branch with `function` of each operand that is there."""
        bias = None if self.bias is None else function(self.bias)
        return Branch(function(self.subject), function(self.object), function(self.weight), bias)


def fused_relation_logits(
    subject: Tensor,
    object: Tensor,
    union: Tensor,
    pairs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return the predicate logits of R pairs of N objects, without any tensor of R x C but `union` itself.

    ``logits[r] = weight ((subject[s] + object[o]) * union[r]) + bias`` with ``s, o = pairs[r]``. This is the end of
    Neural Motifs as in Scene-Graph-Benchmark: its ``post_cat``, a linear layer on the concatenated features of subject
    and object, is the sum of two linear layers on N objects each (its bias goes into one of them), and what it gives
    is multiplied with the pair's union features before the last layer, ``rel_compress``.

    Differentiable once in subject, object, union, weight and bias; deterministic.

    Args:
        subject, object: ``[N, C]``, float32, float64, bfloat16 or float16: each object as one end of a pair.
        union: ``[R, C]`` features of the pairs. Any row stride; copied if the last stride is not 1, as the others.
        pairs: int64 ``[R, 2]``, subject and object in 0 to N - 1; in any order, repeated or not.
        weight: ``[K, C]``; bias: ``[K]`` or None.
        backend: "cpu" (compiled), "triton" or "cuda" (GPUs), "reference" (plain PyTorch); None takes the fastest that
            serves device and dtype.

    Returns:
        ``[R, K]`` in the dtype of `union`; under autocast in autocast's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or device.
        IndexError: a pair is out of range; found before anything is computed. On a GPU it is a device-side assertion,
            which torch for ROCm is built without: there the result is undefined.
        ImportError: the compiled core is not built, or older than its sources, or the backend is not installed.
        RuntimeError: in the backward pass, of a gradient of the gradient, which "reference" alone has.
    """
    return _relation_logits([Branch(subject, object, weight, bias)], union, pairs, backend)[0]


def dual_branch_relation_logits(
    subject: Tensor,
    object: Tensor,
    mirrored_subject: Tensor,
    mirrored_object: Tensor,
    union: Tensor,
    pairs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mirrored_weight: Tensor,
    mirrored_bias: Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `fused_relation_logits` of the supervised and of the mirrored branch, in one pass over `union`.

    Args:
        subject, object, weight, bias: of the supervised branch, as in `fused_relation_logits`.
        mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias: of the mirror, of the same shapes. A tied
            head is the same `weight` and `bias` twice.
        union, pairs, backend: of both, as in `fused_relation_logits`.

    Returns:
        ``(logits, mirrored_logits)``, each ``[R, K]``.

    Raises:
        As `fused_relation_logits`.
    """
    branches = [
        Branch(subject, object, weight, bias),
        Branch(mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias),
    ]
    logits, mirrored_logits = _relation_logits(branches, union, pairs, backend)
    return logits, mirrored_logits


def _relation_logits(branches: list[Branch], union: Tensor, pairs: Tensor, backend: str | None) -> tuple[Tensor, ...]:
    """Return the logits of each branch."""
    operands = [*itertools.chain(*branches)]
    plain = is_plain(union, pairs, *operands)
    _check(plain, union, pairs, *operands)
    dtype = computed_dtype(union)
    backend = backends.choose(backend, union.device, dtype)
    if backend != "cpu":
        _check_pairs(pairs, len(branches[0].subject))
    union = cast(union, dtype)
    branches = [branch.map(lambda tensor: cast(tensor, dtype)) for branch in branches]
    if backend == "reference":
        return tuple(reference.relation_logits(s, o, union, pairs, w, b) for s, o, w, b in branches)
    missing = [None] * len(Branch._fields) * (2 - len(branches))
    union, *operands = distinct([union, *itertools.chain(*branches), *missing])
    return call(_RelationLogits, plain, backend, union, pairs, *operands)


# ------------------------------------------------------------------------------------------------------ checks


@once_a_signature
def _check(union: Tensor, pairs: Tensor, *operands: Tensor | None) -> None:
    names = [prefix + role for prefix in ("", "mirrored_") for role in Branch._fields]
    named: dict[str, Any] = {
        name: tensor for name, tensor in zip(names, operands) if tensor is not None or not name.endswith("bias")
    }
    for name, tensor in {"union": union, **named}.items():
        check_tensor(name, tensor)
        check_floating(name, tensor)
        check_dtype(name, tensor, union, "the dtype of union,")
        dim = 1 if name.endswith("bias") else 2
        if tensor.dim() != dim:
            raise InputError(f"{name} must have {dim} dimensions, got {tensor.dim()}: {list(tensor.shape)}")
        check_device(name, tensor, union.device, "the device of union,")
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be an int64 tensor, got {getattr(pairs, 'dtype', type(pairs).__name__)}")
    check_dense("pairs", pairs)
    check_device("pairs", pairs, union.device, "the device of union,")
    relations, channels = union.shape
    if pairs.shape != (relations, 2):
        raise InputError(f"pairs must be [{relations}, 2], a row for each of union, got {list(pairs.shape)}")
    objects, classes = len(named["subject"]), len(named["weight"])
    shapes = dict(zip(Branch._fields, ((objects, channels), (objects, channels), (classes, channels), (classes,))))
    for name, tensor in named.items():
        expected = shapes[name.removeprefix("mirrored_")]
        if tensor.shape != expected:
            raise InputError(f"{name} must be {list(expected)} to go with the others, got {list(tensor.shape)}")


def _check_pairs(pairs: Tensor, objects: int) -> None:
    """Raise IndexError for a pair out of range.

    The compiled core for the CPU does so by itself; PyTorch would count negative indices from the end.
    """
    outside = (pairs < 0) | (pairs >= objects)
    if pairs.device.type != "cpu" or torch.compiler.is_compiling():
        # The number of objects is not in the message: each would be a graph of its own for torch.compile.
        torch._assert_async(~outside.any(), "pairs must be at least 0 and below the number of objects")
    elif outside.any():
        row, column = outside.nonzero()[0].tolist()
        got = int(pairs[row, column])
        raise IndexError(f"pairs must be at least 0 and below the number of objects, {objects}, got {got} in row {row}")


# ------------------------------------------------------------------------------------------------------ autograd


class _RelationLogits(torch.autograd.Function):
    """Autograd over the registered operations. Without a mirror its operands are None."""

    @staticmethod
    def forward(
        plain: bool,
        backend: str,
        union: Tensor,
        pairs: Tensor,
        subject: Tensor,
        object: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mirrored_subject: Tensor | None,
        mirrored_object: Tensor | None,
        mirrored_weight: Tensor | None,
        mirrored_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        subjects, objects = _present(subject, mirrored_subject), _present(object, mirrored_object)
        weights, biases = _present(weight, mirrored_weight), _present(bias, mirrored_bias)
        if biases and len(biases) < len(weights):  # one branch alone has a bias
            zeros = weight.new_zeros(weight.shape[0])
            biases = [zeros if bias is None else bias, zeros if mirrored_bias is None else mirrored_bias]
        run = _forward if plain else torch.ops.sgalign.relation_logits
        return tuple(run(backend, union, pairs, subjects, objects, weights, biases))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, ctx.backend, union, pairs, subject, object, weight, _, *mirrored, _ = inputs
        ctx.save_for_backward(union, pairs, subject, object, weight, *mirrored)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        wants_union, needs_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[7::4]
        given = (*grad_logits, None)[:2]
        grads = _logits_gradients(ctx.backend, wants_union, *given, *ctx.saved_tensors)
        by_branch: list[Tensor | None] = []
        for i, (grad, needed) in enumerate(zip(grad_logits, needs_bias)):
            by_branch += [*grads[3 * i : 3 * i + 3], grad.sum(0) if needed else None]
        grad_union = grads[-1] if wants_union else None
        return None, None, grad_union, None, *(*by_branch, None, None, None, None)[:8]


def _gradients(
    backend: str,
    wants_union: bool,
    grad: Tensor,
    mirrored_grad: Tensor | None,
    union: Tensor,
    pairs: Tensor,
    subject: Tensor,
    object: Tensor,
    weight: Tensor,
    mirrored_subject: Tensor | None,
    mirrored_object: Tensor | None,
    mirrored_weight: Tensor | None,
) -> tuple[Tensor, ...]:
    grads, weights = _present(grad, mirrored_grad), _present(weight, mirrored_weight)
    subjects, objects = _present(subject, mirrored_subject), _present(object, mirrored_object)
    plain = is_plain(union, pairs, *grads, *subjects, *objects, *weights)
    run = _backward if plain else torch.ops.sgalign.relation_logits_backward
    return tuple(run(backend, grads, union, pairs, subjects, objects, weights, wants_union))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


_logits_gradients = differentiable_once("the fused relation head", _gradients)


# ------------------------------------------------------------------------------------------------------ operations

_library = torch.library.Library("sgalign", "FRAGMENT")
_library.define(
    "relation_logits(str backend, Tensor union, Tensor pairs, Tensor[] subjects, Tensor[] objects, Tensor[] weights,"
    " Tensor[] biases) -> Tensor[]"
)
# -> the gradients of each branch's subject, object and weight, then that of union if wanted
_library.define(
    "relation_logits_backward(str backend, Tensor[] grad_logits, Tensor union, Tensor pairs, Tensor[] subjects,"
    " Tensor[] objects, Tensor[] weights, bool wants_union) -> Tensor[]"
)


@torch.library.register_fake("sgalign::relation_logits")
def _forward_fake(
    backend: str, union: Tensor, pairs: Tensor, subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors
) -> Tensors:
    return [union.new_empty(union.shape[0], weight.shape[0]) for weight in weights]


@torch.library.register_fake("sgalign::relation_logits_backward")
def _backward_fake(
    backend: str,
    grad_logits: Tensors,
    union: Tensor,
    pairs: Tensor,
    subjects: Tensors,
    objects: Tensors,
    weights: Tensors,
    wants_union: bool,
) -> Tensors:
    grads = [tensor.new_empty(tensor.shape) for branch in zip(subjects, objects, weights) for tensor in branch]
    return [*grads, union.new_empty(union.shape)] if wants_union else grads


@torch.library.impl(_library, "relation_logits", "CompositeExplicitAutograd")
def _forward(
    backend: str, union: Tensor, pairs: Tensor, subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors
) -> Tensors:
    logits = _forward_fake(backend, union, pairs, subjects, objects, weights, biases)
    branches = _dense_branches(subjects, objects, weights, biases)
    _FORWARD[backend](Call(unit_stride(union), pairs.contiguous(), branches), logits)
    return logits


@torch.library.impl(_library, "relation_logits_backward", "CompositeExplicitAutograd")
def _backward(
    backend: str,
    grad_logits: Tensors,
    union: Tensor,
    pairs: Tensor,
    subjects: Tensors,
    objects: Tensors,
    weights: Tensors,
    wants_union: bool,
) -> Tensors:
    grads = _backward_fake(backend, grad_logits, union, pairs, subjects, objects, weights, wants_union)
    ends, grad_union = (grads[:-1], grads[-1]) if wants_union else (grads, None)
    by_branch = [Gradients(grad.contiguous(), *ends[3 * i : 3 * i + 3]) for i, grad in enumerate(grad_logits)]
    branches = _dense_branches(subjects, objects, weights, [])
    _BACKWARD[backend](Call(unit_stride(union), pairs.contiguous(), branches), by_branch, grad_union)
    return grads


def _dense_branches(subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors) -> list[Branch]:
    """Return the branches' operands with last strides of 1."""
    operands = zip(subjects, objects, weights, biases or itertools.repeat(None))
    return [Branch(*of_branch).map(unit_stride) for of_branch in operands]


# ------------------------------------------------------------------------------------------------------ backends
# Tensors reach these functions with a last stride of 1; pairs, outputs and gradients are contiguous.


NO_LOGITS = (None, None)  # a backward needs none


class Call(NamedTuple):
    """The tensors that a forward reads, and its backward again."""

    union: Tensor
    pairs: Tensor
    branches: list[Branch]


class Gradients(NamedTuple):
    """The gradients of one branch: that of the logits is given, the others are written."""

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


_FORWARD: dict[str, Callable[[Call, Tensors], None]] = {
    "cpu": _forward_cpu,
    "triton": _forward_triton,
    "cuda": _forward_cuda,
}
_BACKWARD: dict[str, Callable[[Call, list[Gradients], Tensor | None], None]] = {
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
    """Return the call as the core takes it (`relation_logits` in csrc/bindings.cpp).

    It holds addresses: the tensors must outlive it.
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
        torch.get_num_threads(),
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
