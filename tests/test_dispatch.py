"""Eager calls on ordinary tensors, which bypass torch's dispatcher unless something listens there."""

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sgalign import (
    dual_branch_attention,
    dual_branch_relation_logits,
    fused_masked_attention,
    fused_relation_logits,
    relation_alignment_loss,
)
from sgalign.ops import _operands
from sgalign.ops._autograd import is_plain

PAIRS = torch.tensor([[0, 1], [1, 0], [1, 1]])


def operands(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def attend(query, mirrored_query, key, value, *, backend=None):
    return dual_branch_attention(query, mirrored_query, key, value, mask_ratio=0.3, mask_seed=1, backend=backend)


def relate(subject, object_, union, weight, bias, *, backend=None):
    mirrored = object_, subject
    return dual_branch_relation_logits(
        subject, object_, *mirrored, union, PAIRS, weight, bias, weight, bias, backend=backend
    )


def align(logits, mirrored, *, backend=None):
    return (relation_alignment_loss(logits.detach(), mirrored, backend=backend),)


OPERATIONS = {
    "attention": (attend, operands(*[(1, 2, 3, 8)] * 4)),
    "relation_logits": (relate, operands((2, 4), (2, 4), (3, 4), (5, 4), (5,))),
    "alignment_loss": (align, operands((3, 5), (3, 5))),
}


def gradients(outputs, tensors):
    total = sum((output * (i + 1)).sum() for i, output in enumerate(outputs))
    return torch.autograd.grad(total, tensors, allow_unused=True)


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Silent(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATIONS)
def test_plain_call_bypasses_the_dispatcher(name):
    call, tensors = OPERATIONS[name]
    absent = {operation: None for operation in (name, f"{name}_backward")}
    with mock.patch.multiple(torch.ops.sgalign, create=True, **absent):
        outputs = call(*tensors)
        gradients(outputs, tensors)
        with torch.no_grad():
            torch.testing.assert_close(call(*tensors), outputs, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_dispatch_mode_sees_the_operation_and_changes_nothing(name):
    call, tensors = OPERATIONS[name]
    expected = call(*tensors)
    with Recording() as recording:
        outputs = call(*tensors)
        grads = gradients(outputs, tensors)
    assert f"sgalign.{name}.default" in recording.seen
    if name != "alignment_loss":  # its forward computes the gradient
        assert f"sgalign.{name}_backward.default" in recording.seen
    torch.testing.assert_close((outputs, grads), (expected, gradients(expected, tensors)), rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_profiler_shows_the_operation(name):
    call, tensors = OPERATIONS[name]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(*tensors)
    assert f"sgalign::{name}" in {event.name for event in profiler.events()}


@pytest.mark.parametrize("name", OPERATIONS)
def test_traced_graph_has_the_operation(name):
    call, tensors = OPERATIONS[name]
    detached = [tensor.detach() for tensor in tensors]
    graph = make_fx(lambda tensors: call(*tensors))(detached)
    assert any(str(node.target) == f"sgalign.{name}.default" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(detached), call(*detached), rtol=0, atol=0)


@pytest.mark.parametrize(
    "listener",
    [Recording, Silent, forward_ad.dual_level, torch.autograd.profiler.profile, lambda: torch.device("cpu")],
    ids=["dispatch mode", "function mode", "forward mode", "profiler", "default device"],
)
def test_calls_are_not_plain_while_something_listens(listener):
    tensor = torch.randn(2)
    assert is_plain(tensor, None, 3)
    with listener():
        assert not is_plain(tensor)
    assert is_plain(tensor)


def test_calls_are_not_plain_in_transforms_and_traces():
    plain = []

    def square(tensor):
        plain.append(is_plain(tensor))
        return tensor.square().sum()

    torch.func.grad(square)(torch.randn(2))
    torch.jit.trace(square, torch.randn(2), check_trace=False)
    torch.compile(square, backend="eager")(torch.randn(2))
    assert plain == [False] * 3


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2).as_subclass(Subclass),
        torch.eye(2).to_sparse(),
        torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    ],
    ids=["subclass", "sparse", "nested"],
)
def test_subclasses_and_sparse_or_nested_tensors_are_not_plain(tensor):
    assert not is_plain(tensor)
    assert not is_plain(torch.randn(2), tensor)
    assert is_plain(torch.nn.Parameter(torch.randn(2)))


# ------------------------------------------------------------------------------- counters, transforms and subclasses


def by_torch(operation):
    """Return the products of an operation, for a counter: attention as torch's, the head as its linear layer."""

    def attend(query, mirrored_query, key, value):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return [functional.scaled_dot_product_attention(x, key, value) for x in (query, mirrored_query)]

    def relate(subject, object_, union, weight, bias):
        pair = subject[PAIRS[:, 0]] + object_[PAIRS[:, 1]]
        return [functional.linear(pair * union, weight, bias) for _ in range(2)]

    return {"attention": attend, "relation_logits": relate, "alignment_loss": align}[operation]


@pytest.mark.parametrize("name", OPERATIONS)
def test_flop_counter_counts_the_matrix_products(name):
    call, tensors = OPERATIONS[name]

    def counted(call, tensors):
        with FlopCounterMode(display=False) as counter:
            outputs = call(*tensors)
            forward = counter.get_total_flops()
            gradients(outputs, tensors)
        return forward, counter.get_total_flops() - forward

    forward, backward = counted(call, tensors)
    expected_forward, expected_backward = counted(by_torch(name), tensors)
    assert forward == expected_forward and (forward > 0) == (name != "alignment_loss")
    if name == "attention":  # the kernels compute the scores again
        expected_backward += expected_forward // 2
    assert backward == expected_backward


def test_flop_counter_counts_a_shared_query_once():
    query, _, key, value = operands(*[(1, 2, 3, 8)] * 4)
    counts = []
    for second in (query, query.clone()):
        with FlopCounterMode(display=False) as counter:
            attend(query, second, key, value)
        counts.append(counter.get_total_flops())
    assert 4 * counts[0] == 3 * counts[1] > 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_vmap_needs_the_reference(name):
    call, tensors = OPERATIONS[name]
    batched = [tensor.detach().expand(2, *tensor.shape) for tensor in tensors]
    last = len(tensors) - 1
    outputs = call(*tensors)
    direction = torch.ones(2, *outputs[0].shape)
    transforms = {
        "vmap": lambda call: torch.func.vmap(call)(*batched),
        "vmap of grad": lambda call: torch.func.vmap(torch.func.grad(lambda *x: call(*x)[0].sum(), last))(*batched),
        "jacrev": lambda call: torch.func.jacrev(lambda *x: call(*x)[0], last)(*tensors),
        "batched gradients": lambda call: torch.autograd.grad(
            call(*tensors)[0], tensors, direction, is_grads_batched=True, allow_unused=True
        ),
        "batched gradients with a graph": lambda call: torch.autograd.grad(
            call(*tensors)[0], tensors, direction, is_grads_batched=True, allow_unused=True, create_graph=True
        ),
        "compiled vmap": lambda call: torch.compile(torch.func.vmap(call), backend="aot_eager", dynamic=False)(
            *batched
        ),
    }
    for transformed, run in transforms.items():
        found = run(lambda *x: call(*x, backend="reference"))
        if "vmap" in transformed and "grad" not in transformed:
            for one, single in zip(found, call(*tensors)):
                torch.testing.assert_close(one, torch.stack([single] * 2), rtol=1e-4, atol=1e-6)
        if name == "alignment_loss" and transformed.startswith("batched"):
            run(call)  # the backward is a multiplication
            continue
        with pytest.raises(Exception, match="the kernels do not support vmap.* backend='reference' supports it"):
            run(call)


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_supports_forward_mode(name):
    call, tensors = OPERATIONS[name]
    last = tensors[-1].detach()
    others = [tensor.detach() for tensor in tensors[:-1]]
    _, derivative = torch.func.jvp(lambda x: call(*others, x, backend="reference")[-1].sum(), (last,), (last,))
    (gradient,) = torch.autograd.grad(call(*others, last.requires_grad_())[-1].sum(), last)
    torch.testing.assert_close(derivative, (gradient * last).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_refuse_forward_mode(name):
    call, tensors = OPERATIONS[name]
    tensors = [tensor.detach() for tensor in tensors]
    expected = call(*tensors)
    with forward_ad.dual_level():
        torch.testing.assert_close(call(*tensors), expected)
        dual = forward_ad.make_dual(tensors[-1], tensors[-1])
        with pytest.raises(NotImplementedError, match="jvp"):  # torch.compile does not accept a clearer error
            call(*tensors[:-1], dual)


@pytest.mark.parametrize("name", OPERATIONS)
def test_traced_and_exported_graphs_have_gradients(name):
    call, tensors = OPERATIONS[name]
    expected = gradients(call(*tensors), tensors)

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.Parameter(tensors[-1].detach())

        def forward(self, *others):
            return call(*others, self.last)

    traced = make_fx(lambda tensors: call(*tensors))([tensor.detach() for tensor in tensors])
    torch.testing.assert_close(gradients(traced(tensors), tensors), expected)
    for strict in (False, True):
        exported = torch.export.export(Called(), tuple(tensors[:-1]), strict=strict).module()
        found = gradients(exported(*tensors[:-1]), [*tensors[:-1], *exported.parameters()])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_function_transforms_are_right_or_refused(name):
    """torch.compile puts the operation, not its autograd function, into the graph of torch.func.grad.

    aot_eager differentiates the graph, but before torch 2.14 runs it inside the transform, as the backend "eager" does.
    There the operation refuses.
    """
    refusal = "the kernels do not support torch.func transforms"
    call, tensors = OPERATIONS[name]
    others, last = [tensor.detach() for tensor in tensors[:-1]], tensors[-1].detach()

    def loss(last):
        return call(*others, last)[-1].sum()

    torch._dynamo.reset()
    expected = torch.func.grad(loss)(last)
    if torch.__version__ >= "2.14":
        torch.testing.assert_close(torch.compile(torch.func.grad(loss), backend="aot_eager")(last), expected)
    for backend in ("eager",) if torch.__version__ >= "2.14" else ("eager", "aot_eager"):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=refusal):
            torch.compile(torch.func.grad(loss), backend=backend)(last)


def test_counter_counts_an_exported_program():
    code = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from sgalign import fused_masked_attention

class Attend(torch.nn.Module):
    def forward(self, query):
        return fused_masked_attention(query, query, query)

query = torch.randn(1, 2, 3, 8)
program = torch.export.export(Attend(), (query,)).module()
with FlopCounterMode(display=False) as counter:
    program(query)
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(2 * 2 * 1 * 2 * 3 * 3 * 8), result.stderr


def test_pairs_are_checked_in_vmap():
    union, ends, weight = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 4)
    pairs = torch.stack([PAIRS, PAIRS - 1])
    with pytest.raises(IndexError, match=r"pairs must hold indices in \[0, 2\), got -1$"):
        torch.func.vmap(lambda p: fused_relation_logits(ends, ends, union, p, weight, backend="reference"))(pairs)


def test_distributed_tensors_are_refused_by_name():
    distributed = pytest.importorskip("torch.distributed.tensor")
    experimental = pytest.importorskip("torch.distributed.tensor.experimental")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        (query,) = operands((1, 2, 3, 8))
        sharded = distributed.distribute_tensor(query, mesh, [distributed.Shard(1)])
        for arguments in ((sharded, sharded, sharded), (query, query, sharded)):
            name = "query" if arguments[0] is sharded else "value"
            with pytest.raises(TypeError, match=f"{name} must be a local tensor, got a DTensor: use .*local_map"):
                fused_masked_attention(*arguments)
        seed = distributed.distribute_tensor(torch.tensor(3), mesh, [distributed.Replicate()])
        with pytest.raises(TypeError, match="mask_seed must be a local tensor"):
            fused_masked_attention(query, query, query, mask_ratio=0.5, mask_seed=seed)
        with pytest.raises(TypeError, match="logits must be a local tensor"):
            relation_alignment_loss(sharded[0, 0], sharded[0, 0])
        by_head = [[distributed.Shard(1)]] * 3
        local = experimental.local_map(fused_masked_attention, [distributed.Shard(1)], tuple(by_head))
        out = local(sharded, sharded, sharded)
        torch.testing.assert_close(out.full_tensor(), fused_masked_attention(query, query, query))
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- remembered checks


def test_accepted_shapes_of_attention_hide_no_later_error():
    query, key = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 3, 8)
    fused_masked_attention(query, key, key)
    for _ in range(2):
        with pytest.raises(TypeError, match="value must have the query's dtype"):
            fused_masked_attention(query, key, key.double())
        with pytest.raises(ValueError, match="value must be"):
            fused_masked_attention(query, key, key[:, :, :2])
        with pytest.raises(TypeError, match="mask_ratio must be a number, got bool"):
            fused_masked_attention(query, key, key, mask_ratio=True)
        with pytest.raises(TypeError, match="mask must be a bool tensor"):
            fused_masked_attention(query, key, key, mask=torch.zeros(2, 3))


def test_values_of_pairs_are_checked_at_every_call():
    union = torch.randn(3, 4)
    ends = torch.randn(2, 4)
    fused_relation_logits(ends, ends, union, PAIRS, union)
    with pytest.raises(IndexError, match="got 5 in row 0"):
        fused_relation_logits(ends, ends, union, PAIRS + torch.tensor([[5, 0], [0, 0], [0, 0]]), union)


def test_dtypes_accepted_under_autocast_are_not_remembered():
    query, key = torch.randn(1, 1, 2, 8).bfloat16(), torch.randn(1, 1, 3, 8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert fused_masked_attention(query, key, key).dtype == torch.bfloat16
        with pytest.raises(TypeError, match="key must have the query's dtype"):
            fused_masked_attention(query, key, key)


def test_number_of_remembered_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(_operands, "REMEMBERED", 3)
    checked = []
    check = _operands.once_a_signature(lambda tensor: checked.append(len(tensor)))
    for size in (1, 1, 2, 3, 3, 4, 4, 1):
        check(True, torch.empty(size))
    assert checked == [1, 2, 3, 4, 1]
    check(False, torch.empty(1))
    assert checked[-2:] == [1, 1]
