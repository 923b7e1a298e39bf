"""The alignment loss: pulls the mirrored branch's predictions towards the supervised branch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops.attention import DTYPES, check_dense, unit_stride

KINDS = ("softmax", "sigmoid")
REDUCTIONS = ("element", "relation")
DIRECTIONS = ("teacher_to_student", "symmetric")


def relation_alignment_loss(
    logits: Tensor,
    mirrored_logits: Tensor,
    *,
    kind: str = "softmax",
    reduction: str = "element",
    weight: Tensor | None = None,
    direction: str = "teacher_to_student",
    backend: str | None = None,
) -> Tensor:
    """Divergence between the predictions of the supervised branch (teacher, detached) and of the mirror (student).

    With ``t = softmax(logits[r])`` and ``s = softmax(mirrored_logits[r])``, the divergence of relation r is

        teacher_to_student: KL(t || s) = sum over k of t[k] * (log t[k] - log s[k])
        symmetric:          (KL(t || s) + KL(s || t)) / 2

    and for "sigmoid" the sum over classes of the same between Bernoulli distributions of ``sigmoid(logits[r, k])``. The
    loss is ``sum_r w[r] * divergence[r] / sum_r w[r]``, for "element" also divided by the number of classes K. A class
    to which the first distribution gives probability 0 contributes 0. This is the L_align of Xu, Liao and Sigal, WACV
    2024, who leave reduction and direction open: "element" is the mean over all elements, what
    `torch.nn.functional.kl_div` has called "mean" so far, and K times weaker than "relation".

    Loss and gradient are computed in one pass over the logits, in float32 (float64 for float64), and stay the same bits
    for any number of threads. Differentiable once, in `mirrored_logits` alone.

    Args:
        logits: ``[R, K]`` of the supervised branch, float32, float64, bfloat16 or float16; no gradient flows into them.
        mirrored_logits: ``[R, K]`` of the mirrored branch.
        kind: "softmax" (classes exclude one another, background among them) or "sigmoid".
        reduction: "element" or "relation".
        weight: ``[R]`` of any real dtype, at least 0 (which is not checked: that would wait for the
            device); None weighs all relations the same.
        direction: "teacher_to_student" or "symmetric".
        backend: "cpu" (compiled), "triton" or "cuda" (GPUs), "reference" (plain PyTorch); None takes the fastest that
            serves device and dtype.

    Returns:
        A scalar, float32 (float64 for float64); 0 with zero gradients if there is no relation or all weights are 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """
    for name, value, allowed in (
        ("kind", kind, KINDS),
        ("reduction", reduction, REDUCTIONS),
        ("direction", direction, DIRECTIONS),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, tensor in (("logits", logits), ("mirrored_logits", mirrored_logits)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor of float32, float64, bfloat16 or float16, got {got}")
        check_dense(name, tensor)
    if logits.dim() != 2 or not logits.shape[1]:
        raise InputError(f"logits must be [R, K] with K at least 1, got {list(logits.shape)}")
    if mirrored_logits.shape != logits.shape:
        raise InputError(f"mirrored_logits must be {list(logits.shape)} like logits, got {list(mirrored_logits.shape)}")
    relations, classes = logits.shape
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
        check_dense("weight", weight)
        if weight.is_complex():
            raise TypeError(f"weight must be real, got {weight.dtype}")
        if weight.shape != (relations,):
            raise InputError(f"weight must be [{relations}], one a relation, got {list(weight.shape)}")
    for name, other in (("mirrored_logits", mirrored_logits), ("weight", weight)):
        if other is not None and other.device != logits.device:
            raise InputError(f"{name} must be on the device of logits, {logits.device}, got {other.device}")
    dtype = torch.promote_types(logits.dtype, mirrored_logits.dtype)
    backend = backends.choose(backend, logits.device, dtype)
    logits, mirrored_logits = logits.detach().to(dtype), mirrored_logits.to(dtype)
    scale = 1 / classes if reduction == "element" else 1.0
    if weight is None:
        scale /= max(relations, 1)
    else:
        weight = weight.detach().double()
        total = weight.sum()
        weight = (weight / total.where(total > 0, 1)).to(_computed_in(dtype))
    if backend == "reference":
        if weight is not None:  # 0 times an infinite divergence would be NaN
            without = (weight == 0)[:, None]
            logits, mirrored_logits = logits.masked_fill(without, 0), mirrored_logits.masked_fill(without, 0)
        divergence = reference.alignment_divergence(logits, mirrored_logits, kind, direction)
        return (divergence if weight is None else divergence * weight).sum() * scale
    settings = scale, kind == "sigmoid", direction == "symmetric"
    return _AlignmentLoss.apply(backend, mirrored_logits, logits, weight, *settings)[0]


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _AlignmentLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        backend: str,
        mirrored: Tensor,
        logits: Tensor,
        weight: Tensor | None,
        scale: float,
        sigmoid: bool,
        symmetric: bool,
    ) -> tuple[Tensor, Tensor]:
        losses, grad = torch.ops.sgalign.alignment_loss(backend, mirrored, logits, weight, scale, sigmoid, symmetric)
        return losses.sum(), grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad, mirrored = ctx.saved_tensors
        return None, _AlignmentLossBackward.apply(grad_loss, grad, mirrored), None, None, None, None, None


class _AlignmentLossBackward(torch.autograd.Function):
    """What the forward has left, times the loss's own gradient; cannot be differentiated again, and says so."""

    @staticmethod
    def forward(grad_loss: Tensor, grad: Tensor, mirrored: Tensor) -> Tensor:
        return (grad * grad_loss).to(mirrored.dtype)  # rounded once, with a scale of the loss in it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "sgalign: second-order gradients of the alignment loss are not supported (create_graph=True, or a gradient"
            " of a gradient); backend='reference' has them"
        )


_library = torch.library.Library("sgalign", "FRAGMENT")
# -> each relation's share of the loss, and the gradient of their sum in `mirrored`
_library.define(
    "alignment_loss(str backend, Tensor mirrored, Tensor logits, Tensor? weight, float scale, bool sigmoid,"
    " bool symmetric) -> (Tensor, Tensor)"
)


@torch.library.register_fake("sgalign::alignment_loss")
def _loss_fake(backend: str, mirrored: Tensor, logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = _computed_in(mirrored.dtype)
    return mirrored.new_empty(mirrored.shape[0], dtype=dtype), mirrored.new_empty(mirrored.shape, dtype=dtype)


@torch.library.impl(_library, "alignment_loss", "CompositeExplicitAutograd")
def _loss(
    backend: str,
    mirrored: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    scale: float,
    sigmoid: bool,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    losses, grad = _loss_fake(backend, mirrored, logits)
    mirrored, logits = unit_stride(mirrored), unit_stride(logits)
    weight = None if weight is None else weight.contiguous()
    if backend == "triton":
        from sgalign.kernels import alignment as kernels

        with _cuda.queue(mirrored.device):
            kernels.loss(mirrored, logits, weight, scale, sigmoid, symmetric, losses, grad)
        return losses, grad
    core = _cuda.core(mirrored.device) if backend == "cuda" else _core.load()
    description = core.AlignmentLoss(
        DTYPES.index(mirrored.dtype),
        tuple(mirrored.shape),
        (logits.data_ptr(), logits.stride(0)),
        (mirrored.data_ptr(), mirrored.stride(0)),
        0 if weight is None else weight.data_ptr(),
        scale,
        sigmoid,
        symmetric,
        losses.data_ptr(),
        grad.data_ptr(),
        torch.get_num_threads(),
    )
    if backend == "cuda":
        with _cuda.queue(mirrored.device) as queue:
            core.cuda_alignment_loss(description, queue)
    else:
        core.alignment_loss(description)
    return losses, grad
