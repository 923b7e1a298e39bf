"""Sizes, seeds and streams that change from step to step: each operation is compiled and exported once for all."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sgalign
from sgalign.nn import MaskedMultiheadAttention
from sgalign.ops import _attention_backends, _relation_backends, alignment, backends

STEPS = range(3, 13)


def normal(*shape):
    return torch.randn(shape, requires_grad=True)


def rows(batch, heads, queries, keys, dim=8):
    return [normal(batch, heads, length, dim) for length in (queries, queries, keys, keys)]


def objects_and_pairs(objects, relations, channels=16, classes=20):
    union, pairs = normal(relations, channels), torch.randint(objects, (relations, 2))
    return (
        normal(objects, channels),
        normal(objects, channels),
        union,
        pairs,
        normal(classes, channels),
        normal(classes),
    )


def attend(query, mirrored_query, key, value, seed=5, stream=0, **options):
    drawn = {"mask_ratio": 0.3, "dropout_p": 0.1, "mask_seed": seed, "mask_stream": stream} | options
    if options.get("backend") == "reference":  # one call, because its many operations take seconds to trace
        return sgalign.dual_branch_attention(query, mirrored_query, key, value, **drawn)
    single = sgalign.fused_masked_attention(query, key, value, **drawn)
    shared = sgalign.dual_branch_attention(query, query, key, value, **drawn)
    return single, *shared, *sgalign.dual_branch_attention(query, mirrored_query, key, value, **drawn)


def attend_with_masks(query, mirrored_query, key, value, mask, padding, **options):
    return attend(query, mirrored_query, key, value, mask=mask, key_padding_mask=padding, **options)


def relate(subject, object, union, pairs, weight, bias, **options):
    single = sgalign.fused_relation_logits(subject, object, union, pairs, weight, bias, **options)
    both = sgalign.dual_branch_relation_logits(
        subject, object, object, subject, union, pairs, weight, bias, weight, None, **options
    )
    return single, *both


def align(logits, mirrored, **options):
    by_relation = sgalign.relation_alignment_loss(logits, mirrored, kind="sigmoid", reduction="relation", **options)
    return sgalign.relation_alignment_loss(logits, mirrored, **options), by_relation


def align_with_weights(logits, mirrored, weight, **options):
    return (sgalign.relation_alignment_loss(logits, mirrored, weight=weight, direction="symmetric", **options),)


def draw(batch, heads, queries, keys, seed=5, stream=0):
    return (sgalign.random_attention_mask(batch, heads, queries, keys, ratio=0.3, seed=seed, stream=stream),)


def weigh(query, mirrored_query, key, value, seed=5, stream=0):
    return (sgalign.attention_weights(query, key, mask_ratio=0.3, mask_seed=seed, mask_stream=stream),)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = MaskedMultiheadAttention(12, 3, batch_first=True, mask_ratio=0.3)

    def forward(self, query, memory, seed=5, stream=0):
        return self.attention.dual_branch(query, query, memory, memory, mask_seed=seed, mask_stream=stream)


attend_by_module = Module()


def sizes(i):
    return i, i + 13, i + 26, i + 39


def numbers(i):
    """Return a seed and a stream near the ends of their ranges."""
    return i - 2**63, 2**31 - i


def masks(batch, heads, queries, keys):
    return torch.rand(queries, keys) < 0.3, torch.rand(batch, keys) < 0.2


# A function, and the arguments of one step. No two sizes are equal in the first step, because torch.compile treats
# equal sizes as one size.
CHANGES = {
    "attention, sizes": (attend, lambda i: rows(*sizes(i))),
    "attention, sizes of masks": (attend_with_masks, lambda i: (*rows(*sizes(i)), *masks(*sizes(i)))),
    "attention, seeds and streams": (attend, lambda i: (*rows(2, 5, 4, 33), *numbers(i))),
    "attention, channels": (attend, lambda i: rows(2, 5, 4, 33, dim=i + 10)),
    "attention, seeds in tensors": (attend, lambda i: (*rows(2, 5, 4, 33), torch.tensor(i))),
    "module, lengths": (attend_by_module, lambda i: (normal(2, i + 10, 12), normal(2, 3 * i + 20, 12))),
    "module, seeds and streams": (attend_by_module, lambda i: (normal(2, 4, 12), normal(2, 33, 12), *numbers(i))),
    "relation head, objects": (relate, lambda i: objects_and_pairs(i, 37)),
    "relation head, relations": (relate, lambda i: objects_and_pairs(5, 10 * i)),
    "alignment, relations": (align, lambda i: (normal(i, 20), normal(i, 20))),
    "alignment, classes": (align, lambda i: (normal(7, 10 + i), normal(7, 10 + i))),
    "alignment, weights": (align_with_weights, lambda i: (normal(i, 20), normal(i, 20), torch.rand(i))),
    "mask, sizes": (draw, lambda i: sizes(i)),
    "mask, seeds and streams": (draw, lambda i: (2, 5, 4, 33, *numbers(i))),
    "weights, sizes": (weigh, lambda i: rows(*sizes(i))),
    "weights, seeds and streams": (weigh, lambda i: (*rows(2, 5, 4, 33), *numbers(i))),
}


def without_kernels(monkeypatch, name):
    """Let a backend run on the CPU without kernels. Its outputs have the right sizes and arbitrary values."""
    monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(None, lambda: None))
    for table in (
        _attention_backends.FORWARD,
        _attention_backends.BACKWARD,
        _relation_backends.FORWARD,
        _relation_backends.BACKWARD,
        alignment._LAUNCH,
    ):
        monkeypatch.setitem(table, name, lambda *_: None)


def graphs_of(function, arguments, dynamic, compare=False):
    """Return the number of compiled graphs. If `compare` is True, compare the outputs with eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for step in STEPS:
        given = arguments(step)
        outs = compiled(*given)
        if compare:
            torch.testing.assert_close(outs, function(*given))
        loss = sum(out.float().sum() for out in outs)
        if loss.requires_grad:
            loss.backward()
    return counter.frame_count


CASES = [
    pytest.param(name, backend, marks=pytest.mark.slow if backend == "reference" else ())
    for name, (function, _) in CHANGES.items()
    for backend in (None, "triton", "cuda", "reference")
    if backend is None or function not in (attend_by_module, draw, weigh)
    if backend != "reference" or name != "attention, sizes"  # because sizes of masks are also sizes of queries and keys
]


@pytest.mark.parametrize("name, backend", CASES)
def test_ten_steps_are_one_graph(name, backend, monkeypatch):
    function, arguments = CHANGES[name]
    if backend in ("triton", "cuda"):
        without_kernels(monkeypatch, backend)
    if function in (attend_by_module, draw, weigh):
        called = function  # has no argument `backend`
    else:

        def called(*tensors):
            return function(*tensors, backend=backend)

    assert graphs_of(called, arguments, dynamic=True, compare=backend is None) == 1
    if backend is None:
        # By default, torch compiles the first step for its sizes alone.
        assert graphs_of(called, arguments, dynamic=None) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("option", ["mask_ratio", "dropout_p", "scale"])
def test_a_new_ratio_or_scale_has_an_effect_in_compiled_code(option):
    """Inductor turns floats into tensors where it can, and must not keep an old value elsewhere."""
    torch._dynamo.reset()
    query, _, key, value = rows(2, 5, 4, 300)

    def attend(number):
        return number * sgalign.fused_masked_attention(query, key, value, mask_seed=1, **{option: number})

    compiled = torch.compile(attend)
    for number in (0.2, 0.4, 0.6, 0.7):
        torch.testing.assert_close(compiled(number), attend(number))


# ----------------------------------------------------------------------------------------------- unknown sizes


def chosen(function):
    """Return a function that calls `function` with some rows, whose number depends on the values of a mask."""
    return lambda tensors, kept, **options: function([tensor[kept.nonzero()[:, 0]] for tensor in tensors], **options)


def some_relations(tensors, backend):
    union, pairs = tensors
    subject, object, _, _, weight, bias = OBJECTS
    return relate(subject, object, union, pairs, weight, bias, backend=backend)


def some_objects(tensors, backend):
    subject, object = tensors
    pairs = OBJECTS[3] * 0
    return relate(subject, object, OBJECTS[2], pairs, *OBJECTS[4:], backend=backend)


def some_keys(tensors, backend):
    (memory,) = tensors
    key = memory.permute(1, 2, 0, 3)
    mask, padding = key[0, 0, :, 0] > 1, key[:, 0, :, 0] > 1
    return attend(ROWS[0], ROWS[1], key, key, mask=mask, key_padding_mask=padding, backend=backend)


def some_queries(tensors, backend):
    (queries,) = tensors
    query = queries.permute(1, 2, 0, 3)
    return attend(query, 2 * query, *ROWS[2:], backend=backend)


def some_images(tensors, backend):
    return attend(*tensors, backend=backend)


def some_to_align(tensors, backend):
    return *align(*tensors, backend=backend), *align_with_weights(*tensors, tensors[0][:, 0].square(), backend=backend)


def some_queries_of_a_mask(tensors):
    return draw(2, 3, tensors[0].shape[0], 5)


def some_keys_of_weights(tensors):
    return weigh(ROWS[0], None, tensors[0].permute(1, 2, 0, 3), None)


torch.manual_seed(0)
OBJECTS = objects_and_pairs(5, 10)
ROWS = rows(2, 5, 4, 33)
UNKNOWN = {
    "relations": (some_relations, OBJECTS[2:4]),
    "objects": (some_objects, [normal(10, 16), normal(10, 16)]),
    "keys": (some_keys, [normal(10, 2, 5, 8)]),
    "queries": (some_queries, [normal(10, 2, 5, 8)]),
    "images": (some_images, rows(10, 2, 3, 7)),
    "relations to align": (some_to_align, [normal(10, 20), normal(10, 20)]),
    "sizes of a mask": (some_queries_of_a_mask, [normal(10)]),
    "keys of weights": (some_keys_of_weights, [normal(10, 2, 5, 8)]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, options",
    [(name, {"backend": None}) for name in list(UNKNOWN)[:6]]
    + [pytest.param(name, {"backend": "reference"}, marks=pytest.mark.slow) for name in list(UNKNOWN)[:6]]
    + [(name, {}) for name in list(UNKNOWN)[6:]],
)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_may_depend_on_values(name, options):
    """The number of rows comes from `nonzero`, so torch.compile does not know it."""
    function, tensors = UNKNOWN[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chosen(function), backend=counter, fullgraph=True)
    masks_of_rows = [torch.arange(10) % 3 > 0, torch.arange(10) > 8, torch.ones(10) > 0]
    if name != "objects":  # the pairs refer to an object
        masks_of_rows.append(torch.zeros(10) > 0)
    for kept in masks_of_rows:
        found, expected = (f(tensors, kept, **options) for f in (compiled, chosen(function)))
        torch.testing.assert_close(found, expected)
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        if expected[0].requires_grad:
            found, expected = (
                torch.autograd.grad(sum(out.sum() for out in outs), leaves, allow_unused=True)
                for outs in (found, expected)
            )
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


TWO_SELECTIONS = {
    "alignment": (lambda a, b: align(a, b), [normal(10, 20), normal(10, 20)]),
    "relation head": (lambda union, pairs: relate(*OBJECTS[:2], union, pairs, *OBJECTS[4:]), OBJECTS[2:4]),
    "attention": (
        lambda key, value: attend(*ROWS[:2], key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)),
        [normal(10, 2, 5, 8), normal(10, 2, 5, 8)],
    ),
}


@pytest.mark.parametrize("name", TWO_SELECTIONS)
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_two_selections_are_compared_when_the_code_runs(name):
    function, tensors = TWO_SELECTIONS[name]

    def call(first, second):
        return function(tensors[0][first.nonzero()[:, 0]], tensors[1][second.nonzero()[:, 0]])

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    few, more = torch.arange(10) > 6, torch.arange(10) > 2
    for first, second in ((few, few.flip(0)), (more, more)):
        torch.testing.assert_close(compiled(first, second), call(first, second))
    with pytest.raises(RuntimeError):
        compiled(few, more)


# ---------------------------------------------------------------------------------------------------------- export


class Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "attention, sizes",
        "attention, sizes of masks",
        "attention, channels",
        "weights, sizes",
        "alignment, weights",
        "module, lengths",
        "relation head, objects",
        "relation head, relations",
        "alignment, relations",
    ],
)
def test_exported_program_takes_other_sizes(name, strict):
    function, arguments = CHANGES[name]
    step = tuple(tensor.detach() for tensor in arguments(4))
    changing = [{d: torch.export.Dim.DYNAMIC for d in range(t.dim()) if t.shape[d] != s.shape[d]}
                for t, s in zip(arguments(5), step)]  # fmt: skip
    module, shapes = Called(function), (tuple(changing),)
    if isinstance(function, Module):
        module, shapes = function, tuple(changing)
    program = torch.export.export(module, step, dynamic_shapes=shapes, strict=strict).module()
    for other in (5, 9):
        tensors = [tensor.detach() for tensor in arguments(other)]
        torch.testing.assert_close(program(*tensors), function(*tensors))
