import math

import pytest
import torch
from torch.nn import functional

from sgalign.alignment import relation_alignment_loss


def logits(relations=7, classes=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, relations, classes, generator=generator, dtype=dtype) * 3
    return teacher.requires_grad_(), student.requires_grad_()


def kl(p, q, kind):
    """KL(p || q) of each relation by torch's own function, given logits."""
    if kind == "softmax":
        p, q = p.log_softmax(1), q.log_softmax(1)
        return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    p, q = (torch.stack([functional.logsigmoid(x), functional.logsigmoid(-x)]) for x in (p, q))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum((0, 2))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher", "symmetric"])
def test_equals_torch(kind, direction):
    teacher, student = logits()
    fixed = teacher.detach()
    forth, back = kl(fixed, student, kind), kl(student, fixed, kind)
    divergence = {"teacher_to_student": forth, "student_to_teacher": back, "symmetric": (forth + back) / 2}[direction]
    weight = torch.rand(7, dtype=torch.float64)
    for reduction, share in (("relation", 1), ("element", 5)):
        for w in (None, weight):
            loss = relation_alignment_loss(
                teacher, student, kind=kind, direction=direction, reduction=reduction, weight=w
            )
            expected = (divergence.mean() if w is None else (divergence * w).sum() / w.sum()) / share
            torch.testing.assert_close(loss, expected)
            ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
            torch.testing.assert_close(ours, theirs)


def test_element_is_the_mean_over_elements():
    teacher, student = logits()
    expected = functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").mean()
    torch.testing.assert_close(relation_alignment_loss(teacher, student), expected)


def test_teacher_gets_no_gradient():
    teacher, student = logits()
    for direction in ("teacher_to_student", "student_to_teacher", "symmetric"):
        relation_alignment_loss(teacher, student, direction=direction).backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck(kind):
    teacher, student = logits()
    assert torch.autograd.gradcheck(lambda s: relation_alignment_loss(teacher, s, kind=kind), student)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "student_to_teacher", "symmetric"])
def test_zero_where_equal_and_stable_at_extreme_logits(kind, direction):
    extreme = torch.tensor([[1000.0, -1000, 0], [-1000, -1000, -1000], [1000, 1000, 1000]])
    student = extreme.clone().requires_grad_()
    loss = relation_alignment_loss(extreme, student, kind=kind, direction=direction)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-8
    loss = relation_alignment_loss(extreme, -student, kind=kind, direction=direction)
    student.grad = None
    loss.backward()
    assert loss > 100 and student.grad.isfinite().all()


def test_classes_the_teacher_excludes_contribute_nothing():
    teacher = torch.tensor([[0.0, 0, -math.inf]])
    student = torch.tensor([[0.0, 0, -math.inf]], requires_grad=True)
    loss = relation_alignment_loss(teacher, student)
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_no_relations_and_no_weight_give_zero_with_zero_gradients():
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = relation_alignment_loss(empty.detach(), empty)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)
    teacher, student = logits()
    loss = relation_alignment_loss(teacher, student, weight=torch.zeros(7))
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_half_precision_is_summed_in_float32():
    teacher, student = logits(dtype=torch.float32)
    exact = relation_alignment_loss(teacher, student)
    half = relation_alignment_loss(teacher.bfloat16(), student.bfloat16())
    assert half.dtype == torch.float32 and abs(half - exact) < 0.05 * exact


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kind": "tanh"}, ValueError, "kind must be one of 'softmax', 'sigmoid', got 'tanh'"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of .* got 'mean'"),
        ({"direction": "both"}, ValueError, "direction must be one of .* got 'both'"),
        ({"weight": torch.ones(6)}, ValueError, r"weight must be \[7\], one a relation, got \[6\]"),
        ({"mirrored_logits": torch.zeros(7, 4)}, ValueError, r"mirrored_logits must be \[7, 5\].* got \[7, 4\]"),
        ({"logits": torch.zeros(7)}, ValueError, r"logits must be \[R, K\].* got \[7\]"),
        (
            {"logits": torch.zeros(7, 5, dtype=torch.int64)},
            TypeError,
            "logits must be a floating point tensor, got torch.int64",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {"logits": torch.zeros(7, 5), "mirrored_logits": torch.zeros(7, 5)} | change
    first, second = arguments.pop("logits"), arguments.pop("mirrored_logits")
    with pytest.raises(error, match=message):
        relation_alignment_loss(first, second, **arguments)
