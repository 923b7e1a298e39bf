"""The fused relation head, compared with plain PyTorch in float64."""

import accuracy
import pytest
import torch
from covers import cover
from hypothesis import given, settings
from hypothesis import strategies as st
from target import BACKEND, DEVICE, DTYPES, EXACT, core_only

from sgalign import dual_branch_relation_logits, fused_relation_logits

CLOSE = {"rtol": 1e-12, "atol": 1e-12} if EXACT == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}

# N, R, C, K, with rows, channels and classes that do not fill a tile, several backward tasks, a single object, and many
# classes
SHAPES = [(5, 7, 3, 2), (9, 60, 300, 51), (20, 130, 129, 33), (1, 4, 64, 16), (40, 49, 520, 5), (6, 30, 70, 310)]
if BACKEND != "cpu" and DEVICE == "cpu":  # fewer for Triton's slow interpreter, still with splits and 2 or 3 blocks
    SHAPES = [(5, 7, 3, 2), (4, 70, 520, 51), (1, 4, 64, 140)]
NAMES = ("subject", "object", "weight", "bias")


def make(shape, dtype=torch.float32, *, bias=True, seed=0):
    """Return union, pairs, the operands of both branches, and a gradient for each branch's logits."""
    objects, relations, channels, classes = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def branch():
        ends = [normal(objects, channels), normal(objects, channels)]
        return [*ends, normal(classes, channels) / max(channels, 1) ** 0.5, normal(classes) if bias else None]

    pairs = torch.randint(max(objects, 1), (relations, 2), generator=generator).to(DEVICE)
    grads = [normal(relations, classes), normal(relations, classes)]
    return normal(relations, channels), pairs, [branch(), branch()], grads


def apply(union, pairs, branches, backend=BACKEND):
    subject, object_, weight, bias = branches[0]
    if len(branches) == 1:
        return (fused_relation_logits(subject, object_, union, pairs, weight, bias, backend=backend),)
    mirrored_subject, mirrored_object, mirrored_weight, mirrored_bias = branches[1]
    return dual_branch_relation_logits(
        subject, object_, mirrored_subject, mirrored_object, union, pairs,
        weight, bias, mirrored_weight, mirrored_bias, backend=backend,
    )  # fmt: skip


def run(union, pairs, branches, grads, backend):
    """Return the logits of each branch, and the gradients of union and of every operand."""
    leaf = lambda t: None if t is None else t.detach().requires_grad_()  # noqa: E731
    union, branches = leaf(union), [[leaf(t) for t in branch] for branch in branches]
    logits = apply(union, pairs, branches, backend)
    torch.autograd.backward(logits, grads[: len(branches)])
    return [x.detach() for x in logits], [union.grad, *(t.grad for branch in branches for t in branch if t is not None)]


def assert_accurate(union, pairs, branches, grads, backend=BACKEND):
    """Assert that rounding explains the errors of a backend's results, and return the results."""
    double = lambda t: None if t is None else t.double()  # noqa: E731
    doubles = union.double(), pairs, [[double(t) for t in branch] for branch in branches], [g.double() for g in grads]
    exact, plain = run(*doubles, "reference"), run(union, pairs, branches, grads, "reference")
    ours = run(union, pairs, branches, grads, backend)
    accuracy.assert_accurate(exact, plain, ours)
    return ours


@pytest.mark.parametrize("shape, branches, bias, dtype", cover(SHAPES, (1, 2), (True, False), DTYPES), ids=str)
def test_logits_and_gradients_are_accurate(shape, branches, bias, dtype, instruction_set, poisoned):
    union, pairs, operands, grads = make(shape, dtype, bias=bias)
    assert_accurate(union, pairs, operands[:branches], grads)


@settings(max_examples=60 if BACKEND == "cpu" else 6, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(0, 60), st.integers(1, 150), st.integers(1, 40)),
    branches=st.integers(1, 2),
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_stride_is_accurate(shape, branches, bias, strided, seed):
    union, pairs, operands, grads = make(shape, bias=bias, seed=seed)
    if strided:
        every_other = lambda t: None if t is None else t.repeat_interleave(2, -1)[..., ::2]  # noqa: E731
        union, pairs = every_other(union), pairs.t().contiguous().t()
        operands = [[every_other(t) for t in branch] for branch in operands]
        grads = [grad.t().contiguous().t() for grad in grads]
    assert_accurate(union, pairs, operands[:branches], grads)


@core_only  # needs float64
def test_fused_head_equals_the_layers_of_motifs():
    """Motifs concatenates, applies the layer post_cat, multiplies by the union features and applies rel_compress."""
    union, pairs, _, _ = make((9, 60, 64, 11), torch.float64)
    head, tail = torch.randn(2, 9, 16, dtype=torch.float64)
    post_cat, rel_compress = torch.nn.Linear(32, 64).double(), torch.nn.Linear(64, 11).double()
    usual = rel_compress(post_cat(torch.cat([head[pairs[:, 0]], tail[pairs[:, 1]]], 1)) * union)
    as_subject, as_object = post_cat.weight.chunk(2, 1)
    subject, object_ = torch.nn.functional.linear(head, as_subject, post_cat.bias), tail @ as_object.t()
    fused = fused_relation_logits(subject, object_, union, pairs, rel_compress.weight, rel_compress.bias)
    torch.testing.assert_close(fused, usual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("branches", [1, 2])
def test_each_branch_equals_a_single_branch_to_the_bit(branches):
    union, pairs, operands, grads = make((9, 60, 300, 51))
    dual, _ = run(union, pairs, operands, grads, BACKEND)
    for logits, branch, grad in zip(dual, operands, grads):
        assert torch.equal(run(union, pairs, [branch], [grad], BACKEND)[0][0], logits)


def test_branches_of_equal_operands_are_equal_to_the_bit():
    union, pairs, (branch, _), (grad, _) = make((9, 60, 300, 51))
    (logits, mirrored), grads = run(union, pairs, [branch, branch], [grad, grad], BACKEND)
    assert torch.equal(logits, mirrored)
    assert all(torch.equal(a, b) for a, b in zip(grads[1:5], grads[5:], strict=True))


@core_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_number_of_threads_changes_no_bit(dtype, threads, instruction_set):
    union, pairs, operands, grads = make((20, 200, 300, 51), dtype)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(run(union, pairs, operands, grads, BACKEND))
    for other in results[1:]:
        assert all(torch.equal(a, b) for ours, theirs in zip(results[0], other) for a, b in zip(ours, theirs))


def test_repeated_pairs_and_pairs_of_one_object_are_accurate():
    union, _, operands, grads = make((4, 50, 40, 6))
    for pairs in (torch.full((50, 2), 3, device=DEVICE), torch.tensor([[1, 2]], device=DEVICE).expand(50, 2)):
        assert_accurate(union, pairs, operands, grads)


@pytest.mark.parametrize("shape", [(3, 0, 8, 4), (0, 0, 8, 4), (3, 5, 0, 4), (3, 5, 8, 0), (1, 1, 1, 1)], ids=str)
def test_empty_and_smallest_tensors_give_the_results_of_the_reference(shape, poisoned):
    union, pairs, operands, grads = make(shape)
    ours, theirs = (run(union, pairs, operands, grads, backend) for backend in (BACKEND, "reference"))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b)


@core_only  # needs float64
@pytest.mark.parametrize("branches", [1, 2])
def test_gradients_equal_finite_differences(branches):
    union, pairs, operands, _ = make((4, 6, 5, 3), torch.float64)
    tensors = [union, *(t for branch in operands[:branches] for t in branch)]

    def function(union, *tensors):
        return apply(union, pairs, [tensors[i : i + 4] for i in range(0, len(tensors), 4)])

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("used", [0, 1])
def test_loss_on_one_of_two_branches_ignores_the_other(used):
    union, pairs, operands, grads = make((9, 60, 70, 11), EXACT)
    leaves = [union.requires_grad_(), *(t.requires_grad_() for branch in operands for t in branch)]
    apply(union, pairs, operands)[used].backward(grads[used])
    _, expected = run(union, pairs, operands[used : used + 1], grads[used : used + 1], "reference")
    touched = [leaves[0], *leaves[1 + 4 * used : 5 + 4 * used]]
    for leaf, grad in zip(touched, expected, strict=True):
        torch.testing.assert_close(leaf.grad, grad, **CLOSE)
    others = leaves[5:] if used == 0 else leaves[1:5]
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in others)


@pytest.mark.parametrize("needed", ["union", *NAMES])
def test_one_input_alone_can_require_a_gradient(needed):
    union, pairs, operands, grads = make((9, 60, 70, 11))
    tensors = dict(zip(("union", *NAMES), (union, *operands[0])))
    tensors[needed].requires_grad_()
    apply(union, pairs, operands[:1])[0].backward(grads[0])
    _, expected = run(union, pairs, operands[:1], grads, BACKEND)
    assert torch.equal(tensors[needed].grad, expected[list(tensors).index(needed)])


def test_weight_of_both_branches_gets_the_sum_of_their_gradients():
    union, pairs, (branch, mirrored), grads = make((9, 60, 70, 11), EXACT)
    mirrored[2:] = branch[2:]
    _, separate = run(union, pairs, [branch, mirrored], grads, "reference")
    weight = branch[2].requires_grad_()
    torch.autograd.backward(apply(union, pairs, [branch, mirrored]), grads)
    torch.testing.assert_close(weight.grad, separate[3] + separate[7], **CLOSE)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_operators_pass_opcheck(branches, bias):
    union, pairs, operands, grads = make((4, 6, 5, 3), bias=bias)
    subjects, objects, weights, biases = (list(role) for role in zip(*operands[:branches]))
    inputs = union, pairs, subjects, objects, weights
    torch.library.opcheck(torch.ops.sgalign.relation_logits.default, (BACKEND, *inputs, biases if bias else []))
    for wants_union in (False, True):
        arguments = BACKEND, grads[:branches], *inputs, wants_union
        torch.library.opcheck(torch.ops.sgalign.relation_logits_backward.default, arguments)


def test_compiled_equals_eager():
    union, pairs, operands, grads = make((9, 60, 70, 11))
    compiled = torch.compile(lambda *tensors: apply(*tensors), fullgraph=True, backend="aot_eager")

    def results(function):
        leaves = [t.detach().requires_grad_() for t in (union, *operands[0], *operands[1])]
        logits = function(leaves[0], pairs, [leaves[1:5], leaves[5:]])
        torch.autograd.backward(logits, grads)
        return [*logits, *(leaf.grad for leaf in leaves)]

    assert all(torch.equal(a, b) for a, b in zip(results(compiled), results(apply), strict=True))


def test_compiled_equals_eager_if_branches_share_a_head():
    """The supervised branch also has its subjects as its objects."""
    union, pairs, (branch, mirrored), grads = make((9, 60, 70, 11))
    tied = lambda union: apply(union, pairs, [[branch[0], branch[0], *branch[2:]], [*mirrored[:2], *branch[2:]]])  # noqa: E731
    for tensor in branch:
        tensor.requires_grad_()
    expected = tied(union)
    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")(union)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))
    for ours, theirs in zip(*(torch.autograd.grad(logits, branch[2:], grads) for logits in (compiled, expected))):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2], ids=str)
def test_autocast_computes_in_its_dtype(dtype):
    union, pairs, operands, _ = make((9, 60, 70, 11))
    with torch.autocast(DEVICE, dtype=dtype):
        logits = apply(union, pairs, operands)
    cast = [[t.to(dtype) for t in branch] for branch in operands]
    assert all(torch.equal(a, b) for a, b in zip(logits, apply(union.to(dtype), pairs, cast), strict=True))


def test_second_order_gradients_are_refused():
    union, pairs, operands, _ = make((4, 6, 5, 3))
    (logits,) = apply(union.requires_grad_(), pairs, operands[:1])
    (grad,) = torch.autograd.grad(logits.square().sum(), union, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients of the fused relation head"):
        grad.sum().backward()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.skipif(DEVICE != "cpu", reason="fails an assertion on the device, which then cannot be used")
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_pairs_out_of_range_are_refused(bad, backend):
    union, pairs, operands, _ = make((4, 6, 5, 3))
    pairs[2, 1] = bad
    with pytest.raises(IndexError, match=rf"pairs must hold indices in \[0, 4\), got {bad} in row 2"):
        apply(union, pairs, operands, backend)


BAD = {
    "union": [(lambda t: t[0], ValueError), (lambda t: t.int(), TypeError), (lambda t: t.tolist(), TypeError)],
    "pairs": [(lambda t: t.int(), TypeError), (lambda t: t[:3], ValueError), (lambda t: t.t(), ValueError)],
    "subject": [(lambda t: t[:, :3], ValueError), (lambda t: t.double(), TypeError), (lambda t: None, TypeError)],
    "object": [(lambda t: t[:2], ValueError), (lambda t: t.to("meta"), ValueError)],
    "weight": [(lambda t: t[:, 1:], ValueError), (lambda t: t.bool(), TypeError)],
    "bias": [(lambda t: t[:2], ValueError), (lambda t: t[:, None], ValueError)],
    "mirrored_subject": [(lambda t: t[1:], ValueError)],
    "mirrored_object": [(lambda t: t[0], ValueError)],
    "mirrored_weight": [(lambda t: t[1:], ValueError)],
    "mirrored_bias": [(lambda t: t[1:], ValueError)],
}


@pytest.mark.parametrize("name, index", [(name, i) for name, changes in BAD.items() for i in range(len(changes))])
def test_bad_tensors_are_refused_by_name(name, index):
    union, pairs, (branch, mirrored), _ = make((4, 6, 5, 3))
    arguments = {"union": union, "pairs": pairs} | dict(zip(NAMES, branch))
    arguments |= {f"mirrored_{key}": tensor for key, tensor in zip(NAMES, mirrored)}
    change, error = BAD[name][index]
    arguments[name] = change(arguments[name])
    # The message about a bad union may name a tensor that no longer matches it.
    with pytest.raises(error, match=r"must" if name == "union" else rf"^{name} must"):
        dual_branch_relation_logits(**arguments)


def test_unknown_backend_is_refused():
    union, pairs, operands, _ = make((4, 6, 5, 3))
    with pytest.raises(ValueError, match="backend must be one of"):
        apply(union, pairs, operands, "gpu")
