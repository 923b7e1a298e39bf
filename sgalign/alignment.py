"""The alignment loss: pulls the mirrored branch's predictions towards the supervised branch's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("softmax", "sigmoid")
REDUCTIONS = ("element", "relation")
DIRECTIONS = ("teacher_to_student", "student_to_teacher", "symmetric")


def relation_alignment_loss(
    logits: Tensor,
    mirrored_logits: Tensor,
    *,
    kind: str = "softmax",
    reduction: str = "element",
    weight: Tensor | None = None,
    direction: str = "teacher_to_student",
) -> Tensor:
    """Divergence between the predictions of the supervised branch (teacher, detached) and of the mirror (student).

    With ``t = softmax(logits[r])`` and ``s = softmax(mirrored_logits[r])``, the divergence of relation r is

        teacher_to_student: KL(t || s) = sum over k of t[k] * (log t[k] - log s[k])
        student_to_teacher: KL(s || t)
        symmetric:          (KL(t || s) + KL(s || t)) / 2

    and for "sigmoid" the sum over classes of the same between Bernoulli distributions of ``sigmoid(logits[r, k])``. The
    loss is ``sum_r w[r] * divergence[r] / sum_r w[r]``, for "element" also divided by the number of classes K. A class
    to which the first distribution gives probability 0 contributes 0. This is the L_align of Xu, Liao and Sigal, WACV
    2024, who leave reduction and direction open: "element" is the mean over all elements, what
    `torch.nn.functional.kl_div` has called "mean" so far, and K times weaker than "relation".

    Args:
        logits: ``[R, K]`` of the supervised branch, floating point; no gradient flows into them.
        mirrored_logits: ``[R, K]`` of the mirrored branch.
        kind: "softmax" (classes exclude one another, background among them) or "sigmoid".
        reduction: "element" or "relation".
        weight: ``[R]``, at least 0 (which is not checked: that would wait for the device); None weighs all relations
            the same.
        direction: "teacher_to_student", "student_to_teacher" or "symmetric".

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
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    for name, tensor in (("logits", logits), ("mirrored_logits", mirrored_logits)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [R, K] with K at least 1, got {list(logits.shape)}")
    if mirrored_logits.shape != logits.shape:
        raise ValueError(f"mirrored_logits must be {list(logits.shape)} like logits, got {list(mirrored_logits.shape)}")
    relations, classes = logits.shape
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or None, got {type(weight).__name__}")
    if weight is not None and weight.shape != (relations,):
        raise ValueError(f"weight must be [{relations}], one a relation, got {list(weight.shape)}")

    teacher, student = (_log_probabilities(x, kind) for x in (logits.detach(), mirrored_logits))
    if direction == "teacher_to_student":
        divergence = _divergence(teacher, student)
    elif direction == "student_to_teacher":
        divergence = _divergence(student, teacher)
    else:
        divergence = (_divergence(teacher, student) + _divergence(student, teacher)) / 2
    if weight is None:
        total, weights = divergence.sum(), divergence.new_tensor(relations)
    else:
        weight = weight.to(divergence.dtype)
        total, weights = (divergence * weight).sum(), weight.sum()
    loss = total / weights.where(weights > 0, 1)
    return loss / classes if reduction == "element" else loss


def _log_probabilities(logits: Tensor, kind: str) -> Tensor:
    """``[R, K, 1]`` of one distribution over K classes, or ``[R, K, 2]`` of K distributions over yes and no."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if kind == "softmax":
        return functional.log_softmax(logits, dim=1)[..., None]
    return torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # 0 * (-inf - x) would be NaN, forward and backward.
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=(1, 2))
