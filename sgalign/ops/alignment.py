"""The alignment loss, which pulls the predictions of the mirrored branch towards those of the supervised branch.

A call takes the same steps as in `sgalign.ops.attention`: the checks, `_AlignmentLoss` (autograd), the registered
operation ``sgalign::alignment_loss`` or its implementation `_loss`, and the backend's launch function from the table
`_LAUNCH`. One pass computes the loss and the gradient, so there is no backward operation.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops._autograd import call, differentiable_once, is_plain, is_transformed, no_vmap
from sgalign.ops._operands import (
    DTYPES,
    accumulated_dtype,
    cast,
    check_dense,
    check_device,
    check_tensor,
    differs,
    once_a_signature,
    unit_stride,
)
from sgalign.ops._registration import operation, register

Kind = Literal["softmax", "sigmoid"]
Reduction = Literal["element", "relation"]
Direction = Literal["teacher_to_student", "symmetric"]
KINDS, REDUCTIONS, DIRECTIONS = get_args(Kind), get_args(Reduction), get_args(Direction)


def relation_alignment_loss(
    logits: Tensor,
    mirrored_logits: Tensor,
    *,
    kind: Kind = "softmax",
    reduction: Reduction = "element",
    weight: Tensor | None = None,
    direction: Direction = "teacher_to_student",
    backend: str | None = None,
) -> Tensor:
    """Compute the divergence between the predictions of the supervised and the mirrored branch.

    The supervised branch is the teacher and is detached. The mirrored branch is the student. With
    ``t = softmax(logits[r])`` and ``s = softmax(mirrored_logits[r])``, the divergence of relation r is

        teacher_to_student: KL(t || s) = sum over k of t[k] * (log t[k] - log s[k])
        symmetric:          (KL(t || s) + KL(s || t)) / 2

    If `kind` is "sigmoid", each class k has a Bernoulli distribution with probability ``sigmoid(logits[r, k])``, and
    the divergence of relation r is the sum of the divergences of its classes. In KL(p || q), a class with p = 0
    contributes 0. If q = 0 for a class with p > 0, the loss is infinite.

    The loss is ``sum_r w[r] * divergence[r] / sum_r w[r]``. If `reduction` is "element", it is also divided by the
    number of classes K. Without weights, "element" is therefore the mean over all R x K elements, which is the meaning
    of reduction="mean" in `torch.nn.functional.kl_div`. This loss is L_align of Xu, Liao and Sigal, WACV 2024. The
    paper specifies neither the reduction nor the direction.

    The loss and the gradient are computed in one pass over the logits, in float32 (float64 for float64). The result is
    the same, bit for bit, for any number of threads. The loss is differentiable once, and only in `mirrored_logits`.

    Args:
        logits: the logits of the supervised branch, ``[R, K]``, float32, float64, bfloat16 or float16.
        mirrored_logits: the logits of the mirrored branch, ``[R, K]``, in any of these dtypes. If the two dtypes
            differ, both tensors are promoted to a common dtype. The gradient has the dtype of `mirrored_logits`.
        kind: "softmax" if each relation has one class, which may be the background, or "sigmoid" if it has any number.
        reduction: "element" or "relation".
        weight: the weight of each relation, ``[R]``, in any real dtype, at least 0. If None, all relations have the
            same weight. Negative weights are not rejected, because a check would make the host wait for the device.
        direction: "teacher_to_student" or "symmetric".
        backend: as in `fused_masked_attention`.

    Returns:
        The loss, a float32 scalar (float64 for float64). It is 0 with zero gradients if R is 0 or all weights are 0.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape, dtype, device or value.
        ImportError: if the compiled core is not built or was built from other sources, or the backend is not installed.
        RuntimeError: in the backward pass, if second-order gradients are requested and the backend is not "reference".
    """
    check_choices(kind, reduction, direction)
    plain = is_plain(logits, mirrored_logits, weight)
    _check_logits(plain, logits, mirrored_logits, weight)
    dtype = torch.promote_types(logits.dtype, mirrored_logits.dtype)
    backend = backends.choose(backend, logits.device, dtype)
    logits, mirrored_logits = cast(logits.detach(), dtype), cast(mirrored_logits, dtype)
    shares, per_element = _shares(weight, accumulated_dtype(dtype)), reduction == "element"
    if backend == "reference":
        return _reference(mirrored_logits, logits, shares, per_element, kind, direction)
    options = per_element, kind == "sigmoid", direction == "symmetric"
    return _loss_and_gradient(plain, backend, mirrored_logits, logits, shares, *options)[0]


def _loss_and_gradient(plain: bool, *arguments: Any) -> tuple[Tensor, ...]:
    if plain or is_transformed():
        return call(_AlignmentLoss, plain, *arguments)
    return operation("alignment_loss", plain)(*arguments)


def _shares(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the weights divided by their sum, which is computed in float64."""
    if weight is None:
        return None
    weight = weight.detach().double()
    total = weight.sum()
    return (weight / total.where(total > 0, 1)).to(dtype)


def _divisor(logits: Tensor, weight: Tensor | None, per_element: bool) -> int:
    """Return the number by which the weighted sum of the divergences is divided."""
    relations, classes = logits.shape
    # sym_max asks no question about a symbol. Of a plain number, the compiler of torch 2.11 refuses it.
    at_least = torch.sym_max if isinstance(relations, torch.SymInt) else max
    return (at_least(relations, 1) if weight is None else 1) * (classes if per_element else 1)


def _reference(
    mirrored: Tensor, logits: Tensor, weight: Tensor | None, per_element: bool, kind: str, direction: str
) -> Tensor:
    divisor = _divisor(logits, weight, per_element)
    if weight is None:
        return reference.alignment_divergence(logits, mirrored, kind, direction).sum() / divisor
    without = (weight == 0)[:, None]  # 0 times an infinite divergence would be NaN
    logits, mirrored = logits.masked_fill(without, 0), mirrored.masked_fill(without, 0)
    return (reference.alignment_divergence(logits, mirrored, kind, direction) * weight).sum() / divisor


# ------------------------------------------------------------------------------------------------------ checks


def check_choices(kind: str, reduction: str, direction: str) -> None:
    """Raise InputError unless the options of `relation_alignment_loss` have allowed values."""
    for name, value, allowed in (
        ("kind", kind, KINDS),
        ("reduction", reduction, REDUCTIONS),
        ("direction", direction, DIRECTIONS),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


@once_a_signature
def _check_logits(logits: Tensor, mirrored_logits: Tensor, weight: Tensor | None) -> None:
    for name, tensor in (("logits", logits), ("mirrored_logits", mirrored_logits)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float32, float64, bfloat16 or float16, got {got}")
        check_dense(name, tensor)
    if logits.dim() != 2 or not logits.shape[1]:
        raise InputError(f"logits must be [R, K] with K at least 1, got {list(logits.shape)}")
    if differs(mirrored_logits.shape, logits.shape):
        raise InputError(f"mirrored_logits must be {list(logits.shape)} like logits, got {list(mirrored_logits.shape)}")
    if weight is not None:
        check_tensor("weight", weight)
        if weight.is_complex():
            raise TypeError(f"weight must be real, got {weight.dtype}")
        if differs(weight.shape, logits.shape[:1]):
            raise InputError(f"weight must be [{len(logits)}], one per relation, got {list(weight.shape)}")
    check_device("mirrored_logits", mirrored_logits, logits.device, "the device of logits,")
    if weight is not None:
        check_device("weight", weight, logits.device, "the device of logits,")


# ------------------------------------------------------------------------------------------------------ autograd


class _AlignmentLoss(torch.autograd.Function):
    vmap = staticmethod(no_vmap("the alignment loss"))

    @staticmethod
    def forward(
        plain: bool,
        backend: str,
        mirrored: Tensor,
        logits: Tensor,
        weight: Tensor | None,
        per_element: bool,
        sigmoid: bool,
        symmetric: bool,
    ) -> tuple[Tensor, Tensor]:
        run = operation("alignment_loss", plain)
        return run(backend, mirrored, logits, weight, per_element, sigmoid, symmetric)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor]:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # otherwise torch would allocate zeros for the second output
        ctx.save_for_backward(output[1], inputs[2])
        return output[:1]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        grad, mirrored = ctx.saved_tensors
        grad_mirrored = None if grad_loss is None else _loss_gradient(grad_loss, grad, mirrored)
        return None, None, grad_mirrored, None, None, None, None, None


def _gradient(grad_loss: Tensor, grad: Tensor, mirrored: Tensor) -> Tensor:
    """Return the gradient that the forward pass saved, times the gradient of the loss."""
    return cast(grad * grad_loss, mirrored.dtype)  # rounded once, after any loss scaling


_loss_gradient = differentiable_once("the alignment loss", _gradient)


# ------------------------------------------------------------------------------------------------------ operation


def _loss_fake(backend: str, mirrored: Tensor, logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulated_dtype(mirrored.dtype)
    return mirrored.new_empty((), dtype=dtype), mirrored.new_empty(mirrored.shape, dtype=dtype)


def _loss(
    backend: str,
    mirrored: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    per_element: bool,
    sigmoid: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    grad = mirrored.new_empty(mirrored.shape, dtype=accumulated_dtype(mirrored.dtype))
    losses = grad.new_empty(grad.shape[0])  # each relation's share of the loss
    # The scale is computed here, because torch.compile would compile again for every float that depends on a size.
    scale = 1 / _divisor(logits, weight, per_element)
    weight = None if weight is None else weight.contiguous()
    _LAUNCH[backend](Call(unit_stride(mirrored), unit_stride(logits), weight, scale, sigmoid, symmetric, losses, grad))
    return losses.sum(), grad


# Returns the loss and its gradient with respect to `mirrored`.
register(
    "alignment_loss(str backend, Tensor mirrored, Tensor logits, Tensor? weight, bool per_element, bool sigmoid,"
    " bool symmetric) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    lambda *arguments: _AlignmentLoss.apply(False, *arguments),
)


# ------------------------------------------------------------------------------------------------------ backends


class Call(NamedTuple):
    """The arguments of a launch function, which writes `losses` and `grad`.

    All last strides are 1.
    """

    mirrored: Tensor
    logits: Tensor
    weight: Tensor | None  # contiguous, like `losses` and `grad`
    scale: float  # factor of all relations
    sigmoid: bool
    symmetric: bool
    losses: Tensor
    grad: Tensor


def _launch_cpu(call: Call) -> None:
    core = _core.load()
    core.alignment_loss(_description(core, call))


def _launch_triton(call: Call) -> None:
    from sgalign.kernels import alignment as kernels

    with _cuda.on(call.mirrored.device):
        kernels.loss(*call)


def _launch_cuda(call: Call) -> None:
    core = _cuda.core(call.mirrored.device)
    with _cuda.on(call.mirrored.device):
        core.cuda_alignment_loss(_description(core, call), _cuda.current_stream(call.mirrored.device))


_LAUNCH: dict[str, Callable[[Call], None]] = {
    "cpu": _launch_cpu,
    "triton": _launch_triton,
    "cuda": _launch_cuda,
}


def _description(core: ModuleType, call: Call) -> Any:
    """Return the call in the form that the core accepts (`alignment_loss` in csrc/arguments.h).

    The result holds addresses, so the tensors must outlive it.
    """
    mirrored, logits, weight, scale, sigmoid, symmetric, losses, grad = call
    return core.AlignmentLoss(
        DTYPES.index(mirrored.dtype),
        *mirrored.shape,
        logits.data_ptr(),
        logits.stride()[0],
        mirrored.data_ptr(),
        mirrored.stride()[0],
        0 if weight is None else weight.data_ptr(),
        scale,
        sigmoid,
        symmetric,
        losses.data_ptr(),
        grad.data_ptr(),
        _core.threads(),
    )
