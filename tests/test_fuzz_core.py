"""The checks of the campaign that compares random cases with the reference: they find changed results."""

import ast
import math
import sys

import pytest
import torch
from target import BACKEND, ROOT

sys.path.append(str(ROOT / "tests" / "campaigns"))
import core_checks  # noqa: E402
import processors  # noqa: E402
from core_cases import Alignment, Attention, Relation  # noqa: E402

pytestmark = pytest.mark.skipif(BACKEND != "cpu", reason="the campaign runs on the CPU")


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def attention():
    """Return attention over two heads, the first of which has an infinite number in its values."""
    tensors, grads = [random(1, 2, length, 5) for length in (3, 3, 6, 7)], [random(1, 2, 3, 5)] * 2
    tensors[3] = tensors[2].clone()
    tensors[3][0, 0, 2, 1] = math.inf
    return Attention("dual", tensors, grads, {"mask_seed": 1, "mask_stream": 0}, True)


@pytest.fixture
def relation():
    """Return two rows of the relation head, the first of which has an infinite logit."""
    ends, union = [torch.ones(2, 3)] * 2, torch.ones(2, 3)
    union[0, 0] = math.inf
    operands = [[*ends, torch.ones(4, 3), None]]
    return Relation(union, torch.tensor([[0, 0], [1, 1]]), operands, [torch.ones(2, 4)], True)


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("attention", (0, 0, 0, 1), -math.inf),
        ("attention", (0, 0, 0, 1), 1.0),
        ("attention", (0, 1, 0, 1), math.inf),
        ("attention", (0, 1, 0, 1), 9.0),
        ("attention", (0, 1, 0, 1), math.nan),
        ("relation", (0, 1), -math.inf),
        ("relation", (0, 1), math.nan),
        ("relation", (1, 1), 3.001),
    ],
)
def test_another_result_beside_infinite_numbers_is_found(kind, place, value, request):
    case = request.getfixturevalue(kind)
    expected, ours = core_checks.Expected(case), core_checks.run(case, "cpu")
    expected.check(ours)
    ours[0][0][place] = value
    with pytest.raises(AssertionError, match="output 0"):
        expected.check(ours)


@pytest.mark.parametrize(
    ("one", "other"),
    [(math.inf, torch.finfo(torch.float32).max), (math.nan, math.pi), (math.inf, -math.inf), (1.0, 1 + 2**-23)],
)
def test_results_that_differ_are_not_the_same(one, other):
    results, others = ([[torch.tensor([[x, math.nan, -math.inf, 0.0]])], [None]] for x in (one, other))
    core_checks.same(results, results, "nothing")
    with pytest.raises(AssertionError, match="output 0 depends on threads"):
        core_checks.same(results, others, "threads")


def test_gradients_may_differ_only_where_the_reference_has_none():
    """The second relation has the gradient 0 * inf in the reference. The kernel returns the limit."""
    options = {"kind": "sigmoid", "reduction": "element", "direction": "symmetric"}
    case = Alignment(torch.tensor([[0.2], [math.inf]]), torch.tensor([[0.1], [-math.inf]]), options, True)
    expected, ours = core_checks.Expected(case), core_checks.run(case, "cpu")
    assert expected.exact[1][0][1].isnan() and ours[1][0][1].isfinite()
    expected.check(ours)
    ours[1][0][0] = math.nan
    with pytest.raises(AssertionError, match="gradient 0: not finite in other places"):
        expected.check(ours)


def test_gradients_that_cancel_are_compared_with_the_size_of_their_terms():
    """The terms of the subject's gradient have magnitudes of up to 1000, and their sum is 0."""
    grad = 1000 * random(1, 7).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    case = Relation(
        torch.ones(2, 1), torch.zeros(2, 2).long(), [[torch.ones(1, 1)] * 2 + [random(7, 1), None]], [grad], False
    )
    expected, ours = core_checks.Expected(case), core_checks.run(case, "cpu")
    assert expected.exact[1][1] == 0
    for error, passes in ((1e-4, True), (0.01, False)):
        ours[1][1] = torch.full((1, 1), error)
        if passes:
            expected.check(ours)
        else:
            with pytest.raises(AssertionError, match="gradient 1"):
                expected.check(ours)


def test_a_sum_of_many_small_divergences_is_compared_with_the_size_of_its_terms():
    """The terms of each class have magnitudes of about 1.4, and their sum is about 1e-6."""
    options = {"kind": "sigmoid", "reduction": "element", "direction": "teacher_to_student"}
    case = Alignment(random(3, 38) / 1000, random(38, 3).T / 1000, options, False)
    expected, ours = core_checks.Expected(case), core_checks.run(case, "cpu")
    for error, passes in ((1e-7, True), (1e-6, False)):
        ours[0][0] = expected.exact[0][0].float() + error
        if passes:
            expected.check(ours)
        else:
            with pytest.raises(AssertionError, match="loss"):
                expected.check(ours)


def test_emulated_processors_run_the_instruction_sets_of_the_build():
    found = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Tuple) and len(node.elts) == 3 and isinstance(node.elts[2], ast.List):
            name, width, flags = ast.literal_eval(node)
            found[name] = width, flags
    assert found == processors.SETS
