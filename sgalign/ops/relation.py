"""The relation head of Neural Motifs, for one branch or for both in one pass over the union features.

A call takes the same steps as in `sgalign.ops.attention`: the checks, `_RelationLogits` (autograd), the registered
operation ``sgalign::relation_logits`` or its implementation `_forward`, and the backend's launch function from the
table `FORWARD` in _relation_backends.py. That function runs the compiled core (csrc/cpu/relation.cpp,
csrc/cuda/relation.cu) or the Triton kernels (kernels/relation.py). The gradients take the same steps and use the table
`BACKWARD`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import backends, reference
from sgalign.ops._autograd import call, differentiable_once, is_plain, is_transformed, no_second_order, no_vmap
from sgalign.ops._operands import (
    Tensors,
    cast,
    check_dense,
    check_device,
    check_dtype,
    check_floating,
    check_tensor,
    computed_dtype,
    differs,
    once_a_signature,
    readable,
    unit_stride,
)
from sgalign.ops._registration import operation, register
from sgalign.ops._relation_backends import BACKWARD, FORWARD, Branch, Call, Gradients


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
    """Compute the predicate logits of R pairs among N objects, without an intermediate tensor of size R x C.

    The result is ``logits[r] = weight ((subject[s] + object[o]) * union[r]) + bias`` with ``s, o = pairs[r]``. To
    replace the last layers of Neural Motifs in Scene-Graph-Benchmark, split ``post_cat``, a linear layer on the
    concatenated features of subject and object, into two linear layers on the N objects. Put its bias into one of them,
    and pass their outputs as `subject` and `object`. `weight` and `bias` are those of the last layer, ``rel_compress``.

    The function is deterministic, and differentiable once in `subject`, `object`, `union`, `weight` and `bias`.

    Args:
        subject, object: the features of each object in either role, ``[N, C]``, in the dtype of `union`.
        union: the union features of each pair, ``[R, C]``, float32, float64, bfloat16 or float16. All matrices may have
            any row stride, but a matrix is copied if its last stride is not 1.
        pairs: the indices of the subject and the object of each pair, int64 ``[R, 2]``, each from 0 to N - 1. Pairs may
            be in any order and may repeat.
        weight, bias: the weight ``[K, C]`` and the bias ``[K]`` of the last layer. If `bias` is None, no bias is added.
        backend: as in `fused_masked_attention`.

    Returns:
        The logits, ``[R, K]``, in the dtype of `union`, or in autocast's dtype under autocast (float64 stays float64).

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype or device.
        IndexError: if an index in `pairs` is out of range, before anything is computed. On a GPU, a device-side
            assertion fails instead. ROCm builds of torch lack these assertions, so there the result is undefined. If
            torch.compile traces "reference", a RuntimeError is raised instead.
        ImportError: if the compiled core is not built or was built from other sources, or the backend is not installed.
        RuntimeError: in the backward pass, if second-order gradients are requested and the backend is not "reference".
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
    """Compute `fused_relation_logits` of the supervised and the mirrored branch in one pass over `union`.

    Args:
        subject, object, weight, bias: the operands of the supervised branch, as in `fused_relation_logits`.
        mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias: the operands of the mirrored branch, in the
            same shapes. To use one head for both branches, pass the same weight and bias twice.
        union, pairs, backend: the operands of both branches, as in `fused_relation_logits`.

    Returns:
        ``(logits, mirrored_logits)``, each ``[R, K]``.

    Raises:
        TypeError, ValueError, IndexError, ImportError, RuntimeError: as in `fused_relation_logits`.
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
    if backend != "cpu":  # The core checks the pairs itself. PyTorch would accept negative indices.
        _check_pairs(pairs, branches[0].subject.shape[0])
    union = cast(union, dtype)
    branches = [branch.map(lambda tensor: cast(tensor, dtype)) for branch in branches]
    if backend == "reference":
        return tuple(reference.relation_logits(s, o, union, pairs, w, b) for s, o, w, b in branches)
    if 0 < len(_present(*[branch.bias for branch in branches])) < len(branches):
        # The operation takes a bias for all branches or for none.
        zeros = branches[0].weight.new_zeros(branches[0].weight.shape[0])
        branches = [branch._replace(bias=zeros) if branch.bias is None else branch for branch in branches]
    if plain or is_transformed():
        missing = [None] * len(Branch._fields) * (2 - len(branches))
        return call(_RelationLogits, plain, backend, union, pairs, *itertools.chain(*branches), *missing)
    subjects, objects, weights, biases = (list(of_branches) for of_branches in zip(*branches))
    run = operation("relation_logits", plain)
    return tuple(run(backend, union, pairs, subjects, objects, weights, _present(*biases)))


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
    if differs(pairs.shape, (relations, 2)):
        raise InputError(f"pairs must be [{relations}, 2], one row per row of union, got {list(pairs.shape)}")
    objects, classes = named["subject"].shape[0], named["weight"].shape[0]  # len() would be a constant in an export
    shapes = dict(zip(Branch._fields, ((objects, channels), (objects, channels), (classes, channels), (classes,))))
    for name, tensor in named.items():
        expected = shapes[name.removeprefix("mirrored_")]
        if differs(tensor.shape, expected):
            raise InputError(
                f"{name} must be {list(expected)} to match union, subject and weight, got {list(tensor.shape)}"
            )


def _check_pairs(pairs: Tensor, objects: int) -> None:
    """Raise IndexError, or fail an assertion on a GPU and in traced code, if an index in `pairs` is out of range."""
    values = readable(pairs)
    checked = pairs if values is None else values
    outside = (checked < 0) | (checked >= objects)
    if values is None:
        # The message omits the number of objects. With it, torch.compile would compile again for every number.
        torch._assert_async(~outside.any(), "pairs must hold indices in [0, number of objects)")
    elif outside.any():
        place = outside.nonzero()[0].tolist()
        where = f" in row {place[0]}" if len(place) == 2 else ""  # vmap adds a dimension
        raise IndexError(f"pairs must hold indices in [0, {objects}), got {int(values[tuple(place)])}{where}")


# ------------------------------------------------------------------------------------------------------ autograd


class _RelationLogits(torch.autograd.Function):
    """The autograd function around the operations. With one branch, the mirrored operands are None."""

    vmap = staticmethod(no_vmap("the fused relation head"))

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
        run = operation("relation_logits", plain)
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
    run = operation("relation_logits_backward", plain)
    return tuple(run(backend, grads, union, pairs, subjects, objects, weights, wants_union))


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


_logits_gradients = differentiable_once("the fused relation head", _gradients)


# ------------------------------------------------------------------------------------------------------ operations


def _forward_fake(
    backend: str, union: Tensor, pairs: Tensor, subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors
) -> Tensors:
    return [union.new_empty(union.shape[0], weight.shape[0]) for weight in weights]


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


def _forward(
    backend: str, union: Tensor, pairs: Tensor, subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors
) -> Tensors:
    logits = _forward_fake(backend, union, pairs, subjects, objects, weights, biases)
    branches = _dense_branches(subjects, objects, weights, biases)
    FORWARD[backend](Call(unit_stride(union), pairs.contiguous(), branches), logits)
    return logits


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
    BACKWARD[backend](Call(unit_stride(union), pairs.contiguous(), branches), by_branch, grad_union)
    return grads


def _dense_branches(subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors) -> list[Branch]:
    """Return the operands of each branch with last strides of 1."""
    operands = zip(subjects, objects, weights, biases or itertools.repeat(None))
    return [Branch(*of_branch).map(unit_stride) for of_branch in operands]


def _with_autograd(
    backend: str, union: Tensor, pairs: Tensor, subjects: Tensors, objects: Tensors, weights: Tensors, biases: Tensors
) -> Tensors:
    operands: Any = zip(subjects, objects, weights, biases or [None, None])  # type: ignore[list-item]
    missing = [None] * len(Branch._fields) * (2 - len(subjects))
    return list(_RelationLogits.apply(False, backend, union, pairs, *itertools.chain(*operands), *missing))


def _flops(backend: str, union: Any, pairs: Any, subjects: Any, objects: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Count the floating-point operations of the product with each branch's weight."""
    return sum(2 * union[0] * classes * channels for classes, channels in weights)


def _backward_flops(backend: str, grad_logits: Any, *others: Any, out_shape: Any) -> int:
    """Count the floating-point operations of two products of the forward's size for each branch."""
    union, weights = others[0], others[4]
    return sum(2 * 2 * union[0] * classes * channels for classes, channels in weights)


register(
    "relation_logits(str backend, Tensor union, Tensor pairs, Tensor[] subjects, Tensor[] objects, Tensor[] weights,"
    " Tensor[] biases) -> Tensor[]",
    _forward,
    _forward_fake,
    _with_autograd,
    _flops,
)
# Returns the gradients of each branch's subject, object and weight, then the gradient of union if it is wanted.
register(
    "relation_logits_backward(str backend, Tensor[] grad_logits, Tensor union, Tensor pairs, Tensor[] subjects,"
    " Tensor[] objects, Tensor[] weights, bool wants_union) -> Tensor[]",
    _backward,
    _backward_fake,
    no_second_order("the fused relation head"),
    _backward_flops,
)
