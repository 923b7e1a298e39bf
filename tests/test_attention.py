"""Attention by the kernels of the tested backend, compared with `sgalign.ops.reference` in float64."""

import math
from unittest import mock

import accuracy
import pytest
import torch
from covers import cover
from hypothesis import given, settings
from hypothesis import strategies as st
from target import BACKEND, DEVICE, DTYPES, EXACT, INTERPRETED, core_only

from sgalign import dual_branch_attention, fused_masked_attention, random_attention_mask
from sgalign.ops import _attention_backends, reference

SEED, STREAM = 5, 3
TOLERANCE = 1e-12 if EXACT == torch.float64 else 1e-5  # largest difference between two computations of a number
BRANCHES = ("single", "dual", "same query")
# B, H, Lq, Lk, D, with keys around the chunk of 256, and with rows and channels that do not fill a tile
SHAPES = [(2, 3, 17, 33, 8), (1, 2, 5, 7, 3), (2, 2, 40, 300, 32), (1, 1, 70, 513, 64), (1, 2, 9, 260, 20)]
SHAPES += [(1, 1, 3, 65, 256)]
if INTERPRETED:
    SHAPES = [(2, 3, 17, 33, 8), (1, 2, 5, 7, 3), (1, 1, 20, 300, 20)]
OPTIONS = ("none", "random", "mask", "padding", "dropout", "all")


def fitting(shape):
    """Return the shape, or a smaller one for Triton's interpreter, which takes seconds for a few blocks."""
    batch, heads, queries, keys, dim = shape
    return (1, min(heads, 2), min(queries, 17), min(keys, 100), dim) if INTERPRETED else shape


def make(shape, dtype=torch.float32, seed=0):
    """Return query, mirrored query, key and value, and a gradient for each branch's output."""
    batch, heads, queries, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(length):
        normal = torch.randn(batch, heads, length, dim, generator=generator, dtype=torch.float64, device="cpu")
        return normal.to(DEVICE, dtype)

    tensors = [normal(queries), normal(queries), normal(keys), normal(keys)]
    return tensors, [normal(queries), normal(queries)]


def draw(*size, seed=0):
    """Return a random mask that is True in about 3 of 10 places."""
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed), device="cpu") < 0.3).to(DEVICE)


def make_options(name, shape):
    batch, _, queries, keys, _ = shape
    options = {
        "random": {"mask_ratio": 0.4},
        "mask": {"mask": draw(batch, 1, queries, keys, seed=1)},
        "padding": {"key_padding_mask": draw(batch, keys, seed=2)},
        "dropout": {"dropout_p": 0.25},
    }
    chosen = options.values() if name == "all" else [options.get(name, {})]
    return {"mask_seed": SEED, "mask_stream": STREAM} | {k: v for option in chosen for k, v in option.items()}


def attend(branches, tensors, backend=BACKEND, **options):
    """Return the outputs of one branch or of both."""
    options["backend"] = backend
    query, mirrored_query, key, value = tensors
    if branches == "single":
        return (fused_masked_attention(query, key, value, **options),)
    return dual_branch_attention(query, query if branches == "same query" else mirrored_query, key, value, **options)


def run(branches, tensors, grad_outs, **options):
    """Return the outputs, and the gradients of query, mirrored query (None if it is not used), key and value."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = attend(branches, tensors, **options)
    torch.autograd.backward(outs, grad_outs[: len(outs)])
    return [out.detach() for out in outs], [tensor.grad for tensor in tensors]


def standard_errors(branches, tensors, grad_outs, *, out_unit=0.0, **options):
    """Return the standard error that float32 gives each element of the outputs and gradients of `run`.

    `out_unit` is the relative error of the output that the backward pass reads, if it is rounded to 16 bits.

    The model is that scores, exponentials, outputs and the weights' gradients are rounded independently, each by one
    unit in the last place. A sum over n keys in blocks of sqrt(n) also rounds 2 sqrt(n) partial sums, each by half a
    unit. Forward and backward may round the same score differently, as BLAS libraries do for different shapes. The
    rows of a softmax's gradient then no longer sum to zero, which large keys make visible.
    """
    unit = torch.finfo(torch.float32).eps
    query, mirrored_query, key, value = (tensor.double() for tensor in tensors)
    queries = {"single": [query], "dual": [query, mirrored_query], "same query": [query, query]}[branches]
    scale, dropout_p = options.get("scale"), options.get("dropout_p", 0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    size = *query.shape[:3], key.shape[2]
    dropped = torch.zeros(size, dtype=torch.bool, device=query.device)
    if "mask" in options:
        dropped = dropped | options["mask"]
    if "key_padding_mask" in options:
        dropped = dropped | options["key_padding_mask"][:, None, None]
    sum_errors = unit**2 * (1 + key.shape[2] ** 0.5 / 6)
    outs, grads = [], [torch.zeros((), dtype=torch.float64)] * 4  # variances
    for i, (query, grad_out) in enumerate(zip(queries, grad_outs)):
        if i == len(queries) - 1 and options.get("mask_ratio"):
            # `random_attention_mask` cannot draw it, because the emulated CUDA core has no mask for the CPU.
            drawn = reference.random_mask(
                size[0] * size[1],
                *size[2:],
                threshold=round(65536 * options["mask_ratio"]),
                seed=torch.tensor(options["mask_seed"]),
                stream=options.get("mask_stream", 0),
                device=dropped.device,
            )
            dropped = dropped | drawn.view(size)
        grad_out = grad_out.double()
        weights = (scale * query @ key.mT).masked_fill(dropped, -math.inf).softmax(-1).nan_to_num(0)
        weight_errors = weights.square() * unit**2 * (1 + scale**2 * query.square() @ key.square().mT)
        total_errors = weight_errors.sum(-1, keepdim=True)  # relative errors, because the weights sum to one
        weights, kept = weights / (1 - dropout_p), (1 - dropout_p) ** -2
        out = weights @ value
        out_errors = kept * weight_errors @ value.square() + (sum_errors + total_errors) * out.square()
        outs.append(out_errors)
        weight_grads = grad_out @ value.mT
        means = (weights * weight_grads).sum(-1, keepdim=True)
        mean_errors = (grad_out.square() * (out_errors + (out_unit * out).square())).sum(-1, keepdim=True)
        own_errors = kept * weight_errors * (weight_grads - means).square()
        own_errors += (unit * weights).square() * (grad_out.square() @ value.square().mT)
        query_errors = own_errors @ key.square() + mean_errors * (weights @ key).square()
        role = i if branches == "dual" else 0
        grads[role] = grads[role] + scale**2 * query_errors
        grads[2] = grads[2] + scale**2 * (own_errors + mean_errors * weights.square()).mT @ query.square()
        grads[3] = grads[3] + (kept * weight_errors + total_errors * weights.square()).mT @ grad_out.square()
    return [[variance.sqrt() for variance in results] for results in (outs, grads)]


def assert_accurate(branches, tensors, grad_outs, *, floor=0.0, backend=BACKEND, **options):
    """Assert that rounding explains the errors of a backend's results. accuracy.py explains `floor`."""
    doubles = [[tensor.double() for tensor in group] for group in (tensors, grad_outs)]
    exact = run(branches, *doubles, backend="reference", **options)
    # The yardstick is PyTorch in the operands' dtype.
    with mock.patch.object(_attention_backends, "accumulated_dtype", lambda dtype: dtype):
        plain = run(branches, tensors, grad_outs, backend="reference", **options)
    ours = run(branches, tensors, grad_outs, backend=backend, **options)
    accuracy.assert_accurate(exact, plain, ours, standard_errors(branches, tensors, grad_outs, **options), floor=floor)


def assert_same(result, expected):
    for ours, theirs in zip(result, expected):
        for a, b in zip(ours, theirs):
            assert a is b is None or torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize(
    "shape, branches, options, dtype", cover(SHAPES, BRANCHES, OPTIONS, DTYPES, strength=3), ids=str
)
def test_outputs_and_gradients_are_accurate(shape, branches, options, dtype, instruction_set, poisoned):
    assert_accurate(branches, *make(shape, dtype), **make_options(options, shape))


@core_only
@pytest.mark.parametrize("keys", [4096, 30_000])
@pytest.mark.parametrize("positive", [False, True])
def test_long_rows_are_accurate(keys, positive):
    """The weights are nearly uniform, which would round worst if one key were added after the other."""
    tensors, grad_outs = make((1, 2, 12, keys, 24))
    tensors = [0.3 * tensor for tensor in tensors]
    if positive:
        tensors[3], grad_outs = tensors[3].abs(), [grad_out.abs() for grad_out in grad_outs]
    assert_accurate("same query", tensors, grad_outs, mask_ratio=0.1, mask_seed=SEED)


LAYOUTS = {
    "contiguous": lambda x: x,
    "projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "slice": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "every other row": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other channel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "one batch": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "one row": lambda x: x[:, :, :1].expand_as(x),
    "one channel": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


@settings(max_examples=12 if INTERPRETED else 60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in ((1, 2, 40, 100, 20) if INTERPRETED else (2, 3, 60, 300, 40)))),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=6, max_size=6),
    branches=st.sampled_from(BRANCHES),
    options=st.sampled_from(OPTIONS),
    # Scores in the hundreds lose digits with a log sum of float32.
    scale=st.sampled_from([None, 0.0, -0.7, 3.0 if EXACT == torch.float64 else 0.9]),
)
def test_any_shape_layout_and_option_is_accurate(shape, layouts, branches, options, scale):
    tensors, grad_outs = make(shape, EXACT)
    strided = [LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, tensors + grad_outs)]
    assert_accurate(branches, strided[:4], strided[4:], floor=1.0, scale=scale, **make_options(options, shape))


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_layout_changes_no_bit(layout, branches, options):
    if layout == "one row" and BACKEND == "triton" and DEVICE == "cuda":
        pytest.skip("Triton adds up channels in another order if it knows that the stride of rows is aligned")
    shape = (2, 2, 9, 40, 12) if INTERPRETED else (2, 3, 20, 70, 12)
    tensors, grad_outs = ([LAYOUTS[layout](tensor) for tensor in group] for group in make(shape))
    options = make_options(options, shape)
    contiguous = ([tensor.contiguous() for tensor in group] for group in (tensors, grad_outs))
    found, expected = run(branches, tensors, grad_outs, **options), run(branches, *contiguous, **options)
    if layout == "slice" and BACKEND == "cuda" and DEVICE == "cuda":
        # Rows that are not aligned use another kernel, in which the compiler fuses other products with sums.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("branches", BRANCHES)
def test_overlapping_windows_change_no_bit(branches, rows):
    """Rows and channels both have stride 1, so the strides do not tell which dimension of a new tensor is inner."""
    tensors = [make((1, 1, 1, 1, rows + 7), seed=i)[0][0].flatten().unfold(0, 8, 1) for i in range(6)]
    tensors = [tensor.expand(2, 3, rows, 8) for tensor in tensors]
    contiguous = [tensor.contiguous() for tensor in tensors]
    assert_same(run(branches, tensors[:4], tensors[4:]), run(branches, contiguous[:4], contiguous[4:]))


def test_output_keeps_the_memory_order_of_a_projection():
    tensors, _ = make((2, 3, 5, 7, 4))
    query = LAYOUTS["projection"](tensors[0])
    (out,) = attend("single", [query, *tensors[1:]])
    assert out.stride() == query.stride()


def test_strides_of_mask_and_padding_change_no_bit():
    batch, heads, queries, keys, _ = shape = fitting((2, 3, 6, 290, 4))
    tensors, grad_outs = make(shape)
    mask = draw(keys, queries, batch, heads).permute(2, 3, 1, 0)
    padding = draw(keys, batch).t()
    expected = run("dual", tensors, grad_outs, mask=mask.contiguous(), key_padding_mask=padding.contiguous())
    assert_same(run("dual", tensors, grad_outs, mask=mask, key_padding_mask=padding), expected)


@pytest.mark.parametrize(
    "size", [(), (1,), (7,), (5, 1), (5, 7), (3, 1, 7), (1, 5, 7), (2, 1, 1, 7), (2, 3, 5, 1)], ids=str
)
def test_mask_broadcasts(size):
    shape = (2, 3, 5, 7, 4)
    tensors, grad_outs = make(shape)
    mask = draw(*size, seed=2)
    full = mask.expand(2, 3, 5, 7).contiguous()
    assert_same(run("dual", tensors, grad_outs, mask=mask), run("dual", tensors, grad_outs, mask=full))


# ----------------------------------------------------------------------------------------------------- gradients


@core_only
@pytest.mark.parametrize("options", ["none", "random", "padding", "dropout", "all"])
@pytest.mark.parametrize("branches", BRANCHES)
def test_gradients_equal_finite_differences(branches, options):
    shape = (1, 2, 4, 6, 3)
    tensors, _ = make(shape, torch.float64)
    options = make_options(options, shape)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    used = tensors[:: 2 if branches == "single" else 1][:4]
    if branches == "single":
        query, _, key, value = tensors
        assert torch.autograd.gradcheck(lambda *t: fused_masked_attention(*t, **options), (query, key, value))
    elif branches == "same query":
        query, _, key, value = tensors
        assert torch.autograd.gradcheck(lambda q, *t: dual_branch_attention(q, q, *t, **options), (query, key, value))
    else:
        assert torch.autograd.gradcheck(lambda *t: dual_branch_attention(*t, **options), used)


def test_query_of_both_branches_gets_the_sum_of_their_gradients():
    shape = fitting((2, 2, 20, 270, 8))
    tensors, grad_outs = make(shape, EXACT)
    options = make_options("all", shape)
    _, (together, unused, key, value) = run("same query", tensors, grad_outs, **options)
    _, (first, mirrored, *expected) = run("dual", [tensors[0], tensors[0].clone(), *tensors[2:]], grad_outs, **options)
    assert unused is None
    torch.testing.assert_close(together, first + mirrored, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close([key, value], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("branches", ["dual", "same query"])
@pytest.mark.parametrize("used", [0, 1])
def test_loss_on_one_of_two_outputs_ignores_the_other(branches, used):
    shape = (1, 2, 9, 40, 8)
    tensors, grad_outs = make(shape)
    options = make_options("random", shape)
    inputs = [tensor.requires_grad_() for tensor in tensors]
    attend(branches, inputs, **options)[used].backward(grad_outs[used])
    alone = [tensor.detach().requires_grad_() for tensor in tensors]
    query = alone[used] if branches == "dual" else alone[0]
    if used == 0:
        options = {}
    attend("single", [query, None, *alone[2:]], **options)[0].backward(grad_outs[used])
    for ours, theirs in zip(inputs, alone):
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needed", range(4))
def test_one_input_alone_can_require_a_gradient(needed):
    tensors, grad_outs = make((1, 2, 9, 40, 8))
    _, grads = run("dual", tensors, grad_outs)
    tensors[needed].requires_grad_()
    torch.autograd.backward(attend("dual", tensors), grad_outs)
    assert torch.equal(tensors[needed].grad, grads[needed])
    assert [tensor.grad is None for tensor in tensors] == [i != needed for i in range(4)]


# --------------------------------------------------------------------------------------------------- two branches


def test_branches_of_equal_queries_are_equal_to_the_bit():
    tensors, _ = make((2, 2, 40, 300, 16))
    tensors[1] = tensors[0].clone()
    for branches in ("dual", "same query"):
        out, mirrored_out = attend(branches, tensors)
        assert torch.equal(out, mirrored_out)


@pytest.mark.parametrize("options", OPTIONS)
def test_same_query_gives_the_outputs_of_its_clone(options):
    shape = fitting((2, 2, 40, 300, 16))
    tensors, _ = make(shape)
    tensors[1] = tensors[0].clone()
    options = make_options(options, shape)
    torch.testing.assert_close(attend("same query", tensors, **options), attend("dual", tensors, **options))


@pytest.mark.parametrize("branches", ["dual", "same query"])
def test_each_branch_equals_a_single_branch(branches):
    shape = fitting((2, 2, 40, 300, 16))
    tensors, _ = make(shape)
    options = make_options("all", shape)
    query, mirrored_query, key, value = tensors
    if branches == "same query":
        mirrored_query = query
    out, mirrored_out = attend(branches, tensors, **options)
    alone = attend("single", [mirrored_query, None, key, value], **options)
    torch.testing.assert_close(mirrored_out, alone[0])
    alone = attend("single", [query, None, key, value], **{**options, "mask_ratio": 0})
    torch.testing.assert_close(out, alone[0])


@pytest.mark.parametrize("branches", BRANCHES)
def test_explicit_mask_is_added_to_the_random_one(branches):
    shape = (2, 2, 12, 40, 8)
    tensors, grad_outs = make(shape, EXACT)
    mask = make_options("mask", shape)["mask"]
    random = random_attention_mask(*shape[:4], ratio=0.4, seed=SEED, device=DEVICE)
    outs, _ = run(branches, tensors, grad_outs, mask=mask, mask_ratio=0.4, mask_seed=SEED)
    expected = [*attend("single", tensors, mask=mask)] if branches != "single" else []
    mirrored_query = tensors[1] if branches == "dual" else tensors[0]
    expected += attend("single", [mirrored_query, *tensors[1:]], mask=mask | random)
    torch.testing.assert_close(outs, expected, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------- rows, NaN and extremes


@pytest.mark.parametrize("branches", BRANCHES)
def test_mask_ratio_1_gives_zeros_in_the_masked_branch_alone(branches, instruction_set, poisoned):
    tensors, grad_outs = make(fitting((2, 2, 20, 270, 8)))
    outs, grads = run(branches, tensors, grad_outs, mask_ratio=1, mask_seed=SEED)
    assert not outs[-1].any()
    if branches == "single":
        assert not any(grad.any() for grad in grads if grad is not None)
    else:  # the supervised branch equals a single one
        alone_outs, alone_grads = run("single", tensors, grad_outs)
        torch.testing.assert_close(outs[0], alone_outs[0])
        torch.testing.assert_close([grads[0], *grads[2:]], [alone_grads[0], *alone_grads[2:]])
        assert branches == "same query" or not grads[1].any()


@pytest.mark.parametrize("dtype", sorted({torch.float32, EXACT}, key=str), ids=str)
@pytest.mark.parametrize("branches", BRANCHES)
def test_rows_without_a_kept_entry_give_zeros(branches, dtype, instruction_set, poisoned):
    """Rows 0 to 4 lose all entries, row 2 by the mask alone and the others by mask and padding together."""
    batch, _, queries, keys, _ = shape = fitting((2, 2, 14, 300, 8))
    tensors, grad_outs = make(shape, dtype)
    padding = torch.zeros(batch, keys, dtype=torch.bool, device=DEVICE)
    padding[:, keys // 3 :] = True
    mask = torch.zeros(queries, keys, dtype=torch.bool, device=DEVICE)
    mask[:5, : keys // 3] = True
    mask[2] = True
    options = {"mask": mask, "key_padding_mask": padding, "mask_ratio": 0.3, "mask_seed": SEED}
    outs, grads = run(branches, tensors, grad_outs, **options)
    for out in outs:
        assert not out[:, :, :5].any() and out[:, :, 5:].all()
    for grad in grads[:2]:
        assert grad is None or not grad[:, :, :5].any()
    assert_accurate(branches, tensors, grad_outs, **options)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_padded_keys_and_values_leak_nowhere(branches, junk, backend, instruction_set, poisoned):
    shape = fitting((2, 2, 14, 300, 8))
    tensors, grad_outs = make(shape)
    options = make_options("all", shape) | {"backend": backend}
    padding = options["key_padding_mask"]
    expected = run(branches, tensors, grad_outs, **options)
    for tensor in tensors[2:]:
        tensor[padding[:, None].expand(tensor.shape[:3])] = junk
    result = run(branches, tensors, grad_outs, **options)
    assert_same(result, expected)
    for grad in result[1][2:]:
        assert not grad[padding[:, None].expand(grad.shape[:3])].any()


@pytest.mark.parametrize("branches", BRANCHES)
def test_score_that_the_mask_drops_may_be_infinite(branches):
    """The value of this entry must be finite, because a product with the weight 0 still reads it."""
    tensors, _ = make((1, 1, 6, 40, 4))
    tensors[2][0, 0, 7] = math.inf
    mask = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    mask[7] = True
    others = [i for i in range(40) if i != 7]
    expected = attend(branches, [*tensors[:2], tensors[2][:, :, others], tensors[3][:, :, others]])
    torch.testing.assert_close(attend(branches, tensors, mask=mask), expected)


@pytest.mark.parametrize("branches", BRANCHES)
def test_nan_in_a_kept_key_reaches_the_outputs(branches):
    tensors, _ = make((1, 1, 3, 300, 4))
    tensors[2][0, 0, 270, 1] = math.nan
    assert all(out.isnan().all() for out in attend(branches, tensors))


GAPS = [(torch.float32, gap) for gap in (20, 50, 54, 60, 90, 200)]
GAPS += [(torch.float64, gap) for gap in (200, 600, 650, 1000)] + [(torch.bfloat16, gap) for gap in (50, 200)]
GAPS = [(dtype, gap) for dtype, gap in GAPS if dtype in DTYPES]
PEAKS = cover([0, 30, 280, 511], BRANCHES, GAPS)
if INTERPRETED:  # one case in which the kernel computes the mirror again, which needs one query and a large gap
    PEAKS = [(280, "same query", (torch.float32, 200)), (0, "dual", (torch.float32, 50))]


@pytest.mark.parametrize("peak, branches, kind", PEAKS, ids=str)
def test_dropped_score_far_above_the_kept_ones_costs_no_accuracy(peak, branches, kind, instruction_set):
    """The supervised maximum is `gap` above all scores that the mirror keeps, in an early or a late chunk of keys."""
    dtype, gap = kind
    tensors, grad_outs = make((1, 1, 30, 512, 8), dtype)
    random = random_attention_mask(1, 1, 30, 512, ratio=0.3, seed=11, device=DEVICE)
    peak_is_dropped = random[..., peak, None]
    assert 0 < peak_is_dropped.sum() < 30
    tensors[0][..., 0] = tensors[1][..., 0] = 1
    tensors[2][..., 0] = 0
    tensors[2][..., peak, :] = 0
    tensors[2][..., peak, 0] = gap
    # Rows that keep the peak are left out, because their gradients are only differences of equal numbers.
    grad_outs = [grad_outs[0] * 0, grad_outs[1] * peak_is_dropped][branches == "single" :]
    assert_accurate(branches, tensors, grad_outs, mask_ratio=0.3, mask_seed=11, scale=1.0)


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rising_scores_cost_no_accuracy(branches, dtype, instruction_set):
    """Each chunk changes the running maximum and with it all earlier sums. The last keys are padding."""
    keys = 275 if INTERPRETED else 1100
    tensors, grad_outs = make((1, 2, 30, keys, 8), dtype)
    tensors[0][..., 0] = tensors[1][..., 0] = 1
    # Scores go up to 27. They are half as large under Triton's interpreter, which rounds products before adding them,
    # while a GPU does not.
    tensors[2][..., 0] = torch.linspace(0, 14 if INTERPRETED else 27, keys, device=DEVICE)
    padding = torch.arange(keys, device=DEVICE)[None] >= 0.9 * keys
    options = {"mask_ratio": 0.9, "mask_seed": SEED, "key_padding_mask": padding, "scale": 1.0}
    assert_accurate(branches, tensors, grad_outs, **options)


def test_large_scores_do_not_overflow(instruction_set):
    tensors, grad_outs = make((1, 1, 20, 100, 16))
    tensors = [tensor * 100 for tensor in tensors[:3]] + tensors[3:]
    for branches in BRANCHES:
        outs, grads = run(branches, tensors, grad_outs, mask_ratio=0.5, mask_seed=SEED)
        assert all(tensor.isfinite().all() for tensor in (*outs, *grads) if tensor is not None)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_scores_may_exceed_the_largest_float16(backend, autocast):
    """Scores are computed in float32, under autocast too."""
    tensors, _ = make((1, 2, 6, 40, 16), torch.float16)
    tensors = [400 * tensor for tensor in tensors[:3]] + tensors[3:]
    assert (tensors[0].double() @ tensors[2].double().mT).max() / 4 > 65504
    (expected,) = attend("single", [tensor.double() for tensor in tensors], "reference")
    given = [tensor.float() for tensor in tensors] if autocast else tensors
    with torch.autocast(DEVICE, torch.float16, enabled=autocast):
        (out,) = attend("single", given, backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


# -------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("branches", BRANCHES)
def test_dropout_draws_from_a_separate_stream(branches):
    batch, heads, queries, keys, dim = shape = fitting((2, 3, 17, 300, 8))
    tensors, grad_outs = make(shape, EXACT)
    threshold = round(0.3 * 65536)
    dropped = reference.random_mask(
        batch * heads, queries, keys, threshold=threshold, seed=torch.tensor(SEED), stream=STREAM | 2**31, device=DEVICE
    ).view(batch, heads, queries, keys)
    random = random_attention_mask(batch, heads, queries, keys, ratio=0.4, seed=SEED, stream=STREAM, device=DEVICE)
    outs, _ = run(branches, tensors, grad_outs, mask_ratio=0.4, dropout_p=0.3, mask_seed=SEED, mask_stream=STREAM)
    queries = {"single": tensors[:1], "dual": tensors[:2], "same query": [tensors[0]] * 2}[branches]
    for i, (query, out) in enumerate(zip(queries, outs)):
        scores = query @ tensors[2].mT / math.sqrt(dim)
        if i == len(outs) - 1:
            scores = scores.masked_fill(random, -math.inf)
        weights = scores.softmax(-1) * ~dropped * (65536 / (65536 - threshold))
        torch.testing.assert_close(out, weights @ tensors[3], rtol=0, atol=TOLERANCE)


def test_dropout_keeps_the_mean():
    """All weights are 1 / Lk and all values are 1, so each output is the rescaled fraction of kept keys."""
    heads, queries, keys = (1, 128, 300) if INTERPRETED else (4, 200, 1000)
    zeros, ones = torch.zeros(1, heads, queries, 1, device=DEVICE), torch.ones(1, heads, keys, 1, device=DEVICE)
    for p in (0.1, 0.5, 0.9):
        (out,) = attend("single", [zeros, None, ones, ones], dropout_p=p, mask_seed=SEED)
        deviation = math.sqrt(p / (1 - p) / (out.numel() * keys))
        assert abs(out.double().mean().item() - 1) < 5 * deviation
        assert out.double().std().item() == pytest.approx(math.sqrt(p / (1 - p) / keys), rel=0.15)


@pytest.mark.parametrize("branches", BRANCHES)
def test_dropout_of_everything_gives_zeros(branches, poisoned):
    outs, grads = run(branches, *make((1, 2, 9, 40, 8)), dropout_p=1, mask_seed=SEED)
    assert not any(tensor.any() for tensor in (*outs, *grads) if tensor is not None)


def test_both_branches_have_the_same_dropout():
    tensors, _ = make(fitting((2, 2, 20, 300, 8)))
    tensors[1] = tensors[0].clone()
    for branches in ("dual", "same query"):
        out, mirrored_out = attend(branches, tensors, dropout_p=0.5, mask_seed=SEED)
        assert torch.equal(out, mirrored_out)
        assert not torch.allclose(out, attend(branches, tensors)[0])


# ----------------------------------------------------------------------------------------------- threads and sizes


@core_only
@pytest.mark.parametrize("shape", [(1, 1, 50, 700, 16), (2, 3, 33, 270, 8), (1, 1, 500, 40, 20)], ids=str)
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_number_of_threads_changes_no_bit(shape, branches, dtype, threads, instruction_set):
    tensors, grad_outs = make(shape, dtype)
    options = make_options("all", shape)
    threads(1)
    expected = run(branches, tensors, grad_outs, **options)
    for count in (2, 3, 5):
        threads(count)
        assert_same(run(branches, tensors, grad_outs, **options), expected)


@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
def test_empty_tensors_give_zeros_of_the_right_shapes(shape, branches, options, poisoned):
    tensors, grad_outs = make(shape)
    options = make_options(options, shape)
    result = run(branches, tensors, grad_outs, **options)
    for tensor in (*result[0], *result[1]):
        assert tensor is None or not tensor.any()  # the elements, if there are any, are zero and not NaN
    expected = run(branches, tensors, grad_outs, backend="reference", **options)
    assert_same(result[:1], expected[:1])
    for out, query in zip(result[0], tensors):
        assert out.shape == query.shape
    for i, (grad, theirs) in enumerate(zip(result[1], expected[1])):
        unused = i == 1 and branches != "dual"
        assert unused == (grad is None)
        assert unused or grad.shape == tensors[i].shape
        assert theirs is None or torch.equal(grad, theirs)


@core_only
@pytest.mark.parametrize("queries, keys, dim", [(0, 0, 4), (0, 5, 0)])
def test_billions_of_heads_without_elements_take_no_time(queries, keys, dim):
    key = torch.empty(2**31, 2, keys, dim, requires_grad=True)
    query = torch.empty(2**31, 2, queries, dim, requires_grad=True)
    fused_masked_attention(query, key, key, mask_ratio=0.5, mask_seed=SEED).sum().backward()
    assert query.grad.shape == query.shape and key.grad.shape == key.shape


def test_default_scale_is_one_over_the_root_of_the_channels():
    tensors, _ = make((1, 2, 9, 40, 16))
    assert_same([attend("dual", tensors, scale=0.25)], [attend("dual", tensors)])


def test_scale_multiplies_the_scores():
    tensors, _ = make((1, 2, 9, 40, 16))
    query, mirrored_query, *others = tensors
    torch.testing.assert_close(
        attend("dual", tensors, scale=0.5), attend("dual", [2 * query, 2 * mirrored_query, *others])
    )


def test_scale_0_gives_the_mean_of_the_values():
    tensors, _ = make((1, 2, 9, 40, 16))
    means = tensors[3].mean(2, keepdim=True).expand_as(tensors[0])
    torch.testing.assert_close(attend("dual", tensors, scale=0), (means, means))


@pytest.mark.parametrize("branches", BRANCHES)
def test_memory_kept_for_the_backward_does_not_grow_with_keys(branches):
    batch, heads, queries, keys, dim = shape = fitting((1, 2, 200, 1000, 8))
    tensors, _ = make(shape)
    padding = torch.zeros(batch, keys, dtype=torch.bool, device=DEVICE)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in (*tensors, padding)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        outs = attend(branches, tensors, mask_ratio=0.4, mask_seed=SEED, dropout_p=0.1, key_padding_mask=padding)
    assert (
        sum(kept.values()) == len(outs) * batch * heads * queries * (dim + 1) * 4 + 8
    )  # outputs, log-sum-exps and the seed


# ------------------------------------------------------------------------------------------------------- the seed


@pytest.mark.parametrize("branches", BRANCHES)
def test_seed_is_drawn_only_if_it_is_needed(branches):
    tensors, _ = make((1, 1, 3, 5, 4))
    state = torch.get_rng_state if DEVICE == "cpu" else torch.cuda.get_rng_state
    before = state()
    attend(branches, tensors)
    attend(branches, tensors, mask_ratio=0.5, dropout_p=0.5, mask_seed=SEED)
    attend(branches, tensors, mask_ratio=1e-9)
    assert torch.equal(state(), before)
    attend(branches, tensors, mask_ratio=0.5)
    assert not torch.equal(state(), before)


@pytest.mark.parametrize("option", ["mask_ratio", "dropout_p"])
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_torchs_manual_seed_repeats_masks_and_dropout(option, backend):
    tensors, _ = make((1, 1, 9, 50, 4))
    options = {option: 0.5, "backend": backend}
    torch.manual_seed(0)
    first, second = attend("single", tensors, **options), attend("single", tensors, **options)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(0)
    assert_same([attend("single", tensors, **options), attend("single", tensors, **options)], [first, second])


SEEDS = [0, -1, 7, 2**63 - 1, -(2**63)]


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_may_be_an_int_or_a_tensor(seed):
    tensors, _ = make((1, 2, 9, 50, 4))
    options = {"mask_ratio": 0.5, "dropout_p": 0.1}
    (out,) = attend("single", tensors, mask_seed=seed, **options)
    for same in (torch.tensor(seed, device=DEVICE), torch.tensor([[seed]], device=DEVICE)):
        assert_same([attend("single", tensors, mask_seed=same, **options)], [[out]])


@pytest.mark.parametrize("seed", SEEDS)
def test_seed_determines_mask_and_dropout(seed):
    tensors, _ = make((1, 2, 9, 50, 4))
    options = {"mask_ratio": 0.5, "dropout_p": 0.1}
    (out,) = attend("single", tensors, mask_seed=seed, **options)
    (expected,) = attend("single", tensors, mask_seed=seed, backend="reference", **options)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, attend("single", tensors, mask_seed=seed ^ 1, **options)[0])


def test_streams_have_different_masks_and_dropout():
    tensors, _ = make((1, 2, 9, 50, 4))
    for option in ("mask_ratio", "dropout_p"):
        outs = [attend("single", tensors, mask_seed=SEED, mask_stream=s, **{option: 0.5})[0] for s in (0, 1, 2**31 - 1)]
        assert not any(torch.allclose(a, b) for a, b in ((outs[0], outs[1]), (outs[0], outs[2]), (outs[1], outs[2])))


@core_only
def test_float16_subnormals_survive_a_thread_that_flushes_subnormals():
    values = torch.tensor([3e-6, 6e-8, -5e-5, 6.1e-5], dtype=torch.float16).reshape(1, 1, 1, 4)
    zero = torch.zeros(1, 1, 1, 4, dtype=torch.float16)
    torch.set_flush_denormal(True)
    try:
        out = fused_masked_attention(zero, zero, values)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out, values)
