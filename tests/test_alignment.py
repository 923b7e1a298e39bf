"""The alignment loss, compared with torch's own functions, and its gradients, edge cases and errors."""

import math

import pytest
import torch
from covers import cover
from target import BACKEND, DEVICE, DTYPES, EXACT, core_only
from torch.nn import functional

from sgalign import relation_alignment_loss


def logits(relations=7, classes=5, *, seed=0, dtype=EXACT):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        torch.randn(2, relations, classes, generator=generator, dtype=torch.float64).to(DEVICE, dtype) * 3
    )
    return teacher.requires_grad_(), student.requires_grad_()


@pytest.fixture(params=[BACKEND, "reference"], autouse=True)
def backend(request, monkeypatch):
    """Run each test with both backends, by changing the default that None stands for."""
    monkeypatch.setattr("sgalign.ops.backends.choose", lambda backend, *_: backend or request.param)
    return request.param


def kl(p, q, kind):
    """Return KL(p || q) of each relation by torch's own function, from logits."""
    if kind == "softmax":
        p, q = p.log_softmax(1), q.log_softmax(1)
        return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    p, q = (torch.stack([functional.logsigmoid(x), functional.logsigmoid(-x)]) for x in (p, q))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum((0, 2))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_loss_and_gradient_equal_those_of_torchs_functions(kind, direction):
    teacher, student = logits()
    fixed = teacher.detach()
    forth, back = kl(fixed, student, kind), kl(student, fixed, kind)
    divergence = {"teacher_to_student": forth, "symmetric": (forth + back) / 2}[direction]
    weight = torch.rand(7, dtype=EXACT, device=DEVICE)
    for reduction, share in (("relation", 1), ("element", 5)):
        for w in (None, weight):
            loss = relation_alignment_loss(
                teacher, student, kind=kind, direction=direction, reduction=reduction, weight=w
            )
            expected = (divergence.mean() if w is None else (divergence * w).sum() / w.sum()) / share
            torch.testing.assert_close(loss, expected)
            ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
            torch.testing.assert_close(ours, theirs)


def test_default_reduction_is_the_mean_over_elements():
    teacher, student = logits()
    expected = functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").mean()
    torch.testing.assert_close(relation_alignment_loss(teacher, student), expected)


def test_teacher_gets_no_gradient():
    teacher, student = logits()
    for direction in ("teacher_to_student", "symmetric"):
        relation_alignment_loss(teacher, student, direction=direction).backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0


@core_only  # needs float64
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_equal_finite_differences(kind):
    teacher, student = logits()
    assert torch.autograd.gradcheck(lambda s: relation_alignment_loss(teacher, s, kind=kind), student)


EXTREME = [[1000.0, -1000, 0], [-1000, -1000, -1000], [1000, 1000, 1000]]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_equal_extreme_logits_give_no_loss_and_no_gradient(kind, direction):
    teacher = torch.tensor(EXTREME, device=DEVICE)
    student = teacher.clone().requires_grad_()
    loss = relation_alignment_loss(teacher, student, kind=kind, direction=direction)
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_opposite_extreme_logits_give_a_large_loss_and_finite_gradients(kind, direction):
    teacher = torch.tensor(EXTREME, device=DEVICE)
    student = teacher.clone().requires_grad_()
    loss = relation_alignment_loss(teacher, -student, kind=kind, direction=direction)
    loss.backward()
    assert loss > 100 and student.grad.isfinite().all()


def test_class_that_the_teacher_excludes_adds_nothing():
    teacher = torch.tensor([[0.0, 0, -math.inf]], device=DEVICE)
    student = torch.tensor([[0.0, 0, -math.inf]], device=DEVICE, requires_grad=True)
    loss = relation_alignment_loss(teacher, student)
    loss.backward()
    assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("distance", [5.0, 97.0, 1000.0])  # 97: float32's exponential is not a normal number
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, EXACT])
def test_class_that_only_the_student_excludes_gives_an_infinite_loss(kind, distance, dtype):
    teacher = torch.tensor([[0.0, 0, -distance]], device=DEVICE, dtype=dtype)
    student = torch.tensor([[0.0, 0, -math.inf]], device=DEVICE, dtype=dtype, requires_grad=True)
    loss = relation_alignment_loss(teacher, student, kind=kind)
    loss.backward()
    p, q = (x.softmax(1) if kind == "softmax" else x.sigmoid() for x in (teacher, student.detach()))
    assert loss == math.inf
    torch.testing.assert_close(student.grad, (q - p) / 3)


@pytest.mark.parametrize("distance", [5.0, 97.0, 1000.0])
def test_symmetric_loss_is_infinite_if_only_the_teacher_excludes_a_class(distance):
    teacher = torch.tensor([[0.0, 0, -math.inf]], device=DEVICE)
    student = torch.tensor([[0.0, 0, -distance]], device=DEVICE)
    for kind in ("softmax", "sigmoid"):
        assert relation_alignment_loss(teacher, student, kind=kind, direction="symmetric") == math.inf


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_number_as_a_mask_excludes_a_class(kind, dtype):
    smallest = torch.finfo(dtype).min
    teacher = torch.tensor([[0.0, smallest]], device=DEVICE, dtype=dtype)
    for logit, expected in ((0.0, math.log(2)), (-200.0, 0.0), (smallest, 0.0)):
        student = torch.tensor([[0.0, logit]], device=DEVICE, dtype=dtype, requires_grad=True)
        loss = relation_alignment_loss(teacher, student, kind=kind, reduction="relation")
        torch.testing.assert_close(loss.item(), expected)
        loss.backward()
        torch.testing.assert_close(student.grad.abs().max().item(), 0.5 if logit == 0 else 0.0)


@pytest.mark.parametrize(
    ("teacher", "student", "kind", "gradient"),
    [
        ([[0.0, "min"]], [[0.0, -200]], "softmax", [0.0, 0.0]),
        ([[150.0, 1, 1]], [[-750, "max", -1e4]], "softmax", [-0.5, 0.5, 0.0]),
        ([[-3e38]], [[-1e38]], "sigmoid", [0.0]),
        ([[-3e38]], [[3e38]], "sigmoid", [0.5]),
    ],
)
def test_gradients_of_the_symmetric_loss_are_right_for_the_largest_numbers(teacher, student, kind, gradient):
    limits = {"min": torch.finfo(torch.float32).min, "max": torch.finfo(torch.float32).max}
    teacher, student = (
        torch.tensor([[limits.get(x, x) for x in row] for row in rows], device=DEVICE) for rows in (teacher, student)
    )
    student.requires_grad_()
    loss = relation_alignment_loss(teacher, student, kind=kind, reduction="relation", direction="symmetric")
    loss.backward()
    torch.testing.assert_close(student.grad.tolist(), [gradient])


def test_no_relations_give_a_loss_of_zero():
    empty = torch.zeros(0, 5, device=DEVICE, requires_grad=True)
    loss = relation_alignment_loss(empty.detach(), empty)
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 5)


def test_weights_of_zero_give_no_loss_and_no_gradient():
    teacher, student = logits()
    loss = relation_alignment_loss(teacher, student, weight=torch.zeros(7, device=DEVICE))
    loss.backward()
    assert loss == 0 and not student.grad.any()


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
def test_relation_of_weight_zero_adds_nothing_even_if_not_finite(value):
    teacher, student = (x.detach() for x in logits())
    expected = relation_alignment_loss(teacher[1:], student[1:])
    student[0, 2] = value
    student.requires_grad_()
    weight = torch.tensor([0.0] + [1.0] * 6, device=DEVICE)
    loss = relation_alignment_loss(teacher, student, weight=weight)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not student.grad[0].any() and student.grad[1:].any(1).all()


def test_half_precision_is_summed_in_float32():
    teacher, student = logits(dtype=torch.float32)
    exact = relation_alignment_loss(teacher, student)
    half = relation_alignment_loss(teacher.bfloat16(), student.bfloat16())
    assert half.dtype == torch.float32 and abs(half - exact) < 0.05 * exact


@pytest.mark.parametrize("relations", [64, 8192])
def test_float16_gradients_of_a_scaled_loss_do_not_underflow(relations):
    """A relation's share of the mean is below float16's smallest number, but its product with the scale is not."""
    teacher, student = (x.detach() for x in logits(relations, 51, dtype=torch.float16))
    student = (teacher + student / 30).requires_grad_()
    (65536 * relation_alignment_loss(teacher, student)).backward()
    exact = student.detach().double().requires_grad_()
    (65536 * relation_alignment_loss(teacher.double(), exact, backend="reference")).backward()
    assert (student.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_nan_reaches_the_loss_and_the_gradient_of_its_relation(kind, direction):
    for branch in (0, 1):
        pair = [x.detach() for x in logits()]
        pair[branch][3, 2] = math.nan
        student = pair[1].requires_grad_()
        loss = relation_alignment_loss(pair[0], student, kind=kind, direction=direction)
        loss.backward()
        assert loss.isnan() and student.grad[3, 2].isnan() and student.grad[:3].isfinite().all()


def test_magnitude_of_equal_weights_does_not_matter():
    teacher, student = logits(dtype=torch.float32)
    for size in (1e-300, 1e300):
        weight = torch.full((7,), size, dtype=torch.float64, device=DEVICE)
        torch.testing.assert_close(
            relation_alignment_loss(teacher, student, weight=weight), relation_alignment_loss(teacher, student)
        )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.ones(7, device="meta")}, ValueError, "weight must be on the device of logits, .*, got meta"),
        ({"weight": torch.ones(7) * 1j}, TypeError, "weight must be real, got torch.complex64"),
        ({"weight": torch.ones(7).to_sparse()}, TypeError, "weight must be a dense tensor, got torch.sparse_coo"),
        ({"logits": torch.ones(7, 5).to_sparse()}, TypeError, "logits must be a dense tensor, got torch.sparse_coo"),
        ({"kind": "tanh"}, ValueError, "kind must be one of 'softmax', 'sigmoid', got 'tanh'"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of .* got 'mean'"),
        ({"direction": "both"}, ValueError, "direction must be one of .* got 'both'"),
        ({"weight": torch.ones(6)}, ValueError, r"weight must be \[7\], one per relation, got \[6\]"),
        ({"mirrored_logits": torch.zeros(7, 4)}, ValueError, r"mirrored_logits must be \[7, 5\].* got \[7, 4\]"),
        ({"logits": torch.zeros(7)}, ValueError, r"logits must be \[R, K\].* got \[7\]"),
        (
            {"logits": torch.zeros(7, 5, dtype=torch.int64)},
            TypeError,
            "logits must be a tensor of float32, .* got torch.int64",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {"logits": torch.zeros(7, 5), "mirrored_logits": torch.zeros(7, 5)} | change
    first, second = arguments.pop("logits"), arguments.pop("mirrored_logits")
    with pytest.raises(error, match=message):
        relation_alignment_loss(first, second, **arguments)


# ---- the kernels


@pytest.mark.parametrize(
    "spread, dtype, kind, direction",
    cover([1e-3, 1, 30], DTYPES, ["softmax", "sigmoid"], ["teacher_to_student", "symmetric"], strength=3),
    ids=str,
)
def test_loss_and_gradient_are_as_accurate_as_plain_pytorch(kind, direction, dtype, spread, instruction_set, poisoned):
    for shape in ((1, 1), (9, 51), (3, 64), (40, 130)):
        teacher, student = (
            torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE) * spread
        )
        weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
        results = []
        for backend, precise in (("reference", True), ("reference", False), (BACKEND, False)):
            t, s = (x.to(dtype).double() if precise else x.to(dtype) for x in (teacher, student))
            s = s.requires_grad_()
            loss = relation_alignment_loss(t, s, kind=kind, direction=direction, weight=weight, backend=backend)
            loss.backward()
            results.append((loss.detach().double(), s.grad.double()))
        for factor, exact, plain, ours in zip((2, 3), *results):
            # Probabilities and their logarithms are rounded, so differences that nearly cancel keep an absolute error.
            floor = 1 / shape[1] if factor == 2 else 1 / (shape[0] * shape[1])
            eps = torch.finfo(dtype if factor == 3 else {torch.float64: dtype}.get(dtype, torch.float32)).eps
            allowed = factor * (plain - exact).abs().max().item()
            allowed += 16 * eps * max(exact.abs().max().item(), floor)
            assert (ours - exact).abs().max().item() <= allowed, (shape, factor)


@core_only
def test_strides_and_threads_change_no_bit(threads):
    wide = torch.randn(2, 30, 102)
    teacher, student = wide[0, :, ::2], wide[1].t().contiguous().t()[:, :51]

    def run(count, *tensors):
        threads(count)
        s = tensors[1].detach().requires_grad_()
        loss = relation_alignment_loss(tensors[0], s, backend="cpu")
        loss.backward()
        return loss.detach(), s.grad

    expected = run(1, teacher.contiguous(), student.contiguous())
    for count in (1, 2, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(count, teacher, student), expected))


def test_operator_passes_opcheck():
    teacher, student = torch.randn(2, 6, 5, device=DEVICE)
    for weight in (None, torch.rand(6, device=DEVICE)):
        torch.library.opcheck(
            torch.ops.sgalign.alignment_loss.default, (BACKEND, student, teacher, weight, False, False, True)
        )


def test_compiled_equals_eager():
    teacher, student = torch.randn(2, 6, 5, device=DEVICE)

    def grad(function):
        leaf = student.clone().requires_grad_()
        function(teacher, leaf).backward()
        return leaf.grad

    compiled = torch.compile(relation_alignment_loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(grad(compiled), grad(relation_alignment_loss))
    assert torch.equal(compiled(teacher, student), relation_alignment_loss(teacher, student)), "without gradients"


def test_only_the_reference_has_second_order_gradients(backend):
    teacher, student = logits()
    (grad,) = torch.autograd.grad(relation_alignment_loss(teacher, student).square(), student, create_graph=True)
    if backend != "reference":
        with pytest.raises(RuntimeError, match="second-order gradients of the alignment loss.*backend='reference'"):
            (student.square().sum() + grad.sum()).backward()
    else:
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_one_tensor_is_kept_for_the_backward(kind, direction):
    """This tensor is the gradient, which has the size of the logits. The logits themselves do not count."""
    logits, mirrored = torch.randn(40, 7, device=DEVICE), torch.randn(40, 7, device=DEVICE, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        relation_alignment_loss(logits, mirrored, kind=kind, direction=direction, backend=BACKEND)
    inputs = {logits.data_ptr(), mirrored.data_ptr()}
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in inputs) == 40 * 7
