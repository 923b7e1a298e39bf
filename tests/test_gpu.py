"""Tests that need a device: captured graphs, streams, several devices, the mirror, and more than 2^31 elements.

`python -m benchmarks.gpu_report` runs these tests and the operations' tests. Without a GPU, these tests are skipped.
"""

import copy
import functools

import pytest
import torch
from target import BACKEND, DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgalign import (
    RelationAlignment,
    dual_branch_attention,
    dual_branch_relation_logits,
    fused_masked_attention,
    random_attention_mask,
    relation_alignment_loss,
)
from sgalign.nn import replace_attention

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and SGALIGN_TEST_BACKEND")
SHAPE = (2, 3, 40, 300, 32)  # B, H, Lq, Lk, D


def make(device=DEVICE, dtype=torch.float32):
    """Return query, mirrored query, key and value."""
    batch, heads, queries, keys, dim = SHAPE
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, queries, keys, keys)
    tensors = (torch.randn(batch, heads, length, dim, generator=generator) for length in lengths)
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def step(tensors, **options):
    """Return the outputs of both branches and all gradients."""
    outs = dual_branch_attention(*tensors, mask_ratio=0.4, dropout_p=0.1, backend=BACKEND, **options)
    return [*outs, *torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs])]


def relation_step():
    """Return a function that returns the logits of both branches, the alignment loss, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(torch.randn, generator=generator)
    union, ends, weights = normal(60, 64), [normal(9, 64) for _ in range(4)], [normal(11, 64) for _ in range(2)]
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in (union, *ends, *weights)]
    pairs = torch.randint(9, (60, 2), generator=generator).to(DEVICE)
    union, subject, object_, mirrored_subject, mirrored_object, weight, mirrored_weight = tensors

    def run():
        logits, mirrored = dual_branch_relation_logits(
            subject, object_, mirrored_subject, mirrored_object, union, pairs, weight, None, mirrored_weight, None,
            backend=BACKEND,
        )  # fmt: skip
        loss = relation_alignment_loss(logits, mirrored, backend=BACKEND)
        return [logits, mirrored, loss, *torch.autograd.grad(loss + logits.sum(), tensors, allow_unused=True)]

    return run


def captured(run):
    """Return a CUDA graph of `run` and the tensors that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def copies(results):
    """Return copies without autograd's graph, which would keep its stream."""
    return [None if result is None else result.detach().clone() for result in results]


def assert_equal(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


def test_replayed_graph_draws_a_new_mask():
    tensors = make()
    graph, results = captured(lambda: step(tensors))
    graph.replay()
    first = copies(results)
    graph.replay()
    second = copies(results)
    assert not any(torch.equal(a, b) for a, b in zip(first, second))


def test_replayed_graph_reads_its_seed_from_the_device():
    tensors, seed = make(), torch.tensor(3, device=DEVICE)
    graph, results = captured(lambda: step(tensors, mask_seed=seed))
    for value in (3, 4):
        seed.fill_(value)
        graph.replay()
        assert_equal(copies(results), step(make(), mask_seed=value))


def test_relation_head_and_alignment_can_be_captured():
    run = relation_step()
    expected = copies(run())
    graph, results = captured(run)
    graph.replay()
    assert_equal(copies(results), expected)


def test_work_goes_into_the_current_stream():
    tensors = make()
    expected = copies(step(tensors, mask_seed=1))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # work in another stream would run before this ends
        moved = [tensor.detach().mul(1).requires_grad_() for tensor in tensors]
        results = step(moved, mask_seed=1)
    side.synchronize()
    assert_equal(results, expected)


def test_tensors_may_be_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = [tensor.cpu() for tensor in step(make(), mask_seed=1)]
    results = step(make("cuda:1"), mask_seed=1)
    assert all(result.device == torch.device("cuda:1") for result in results)
    assert_equal([result.cpu() for result in results], expected)


def test_mask_of_the_device_equals_the_mask_of_the_cpu():
    mask = torch.ops.sgalign.random_mask(BACKEND, torch.tensor(7, device=DEVICE), *SHAPE[:4], 0.3, 2)
    assert torch.equal(mask.cpu(), random_attention_mask(*SHAPE[:4], ratio=0.3, seed=7, stream=2, device="cpu"))


def test_distances_of_2_to_the_31_elements_change_no_bit():
    """Images of a batch are this far apart, in the forward and the backward."""
    apart = 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip("needs 20 GiB of the GPU's memory")
    tensors = make(dtype=torch.float16)
    expected = step(tensors, mask_seed=1)
    far = []
    for tensor in tensors:
        store = torch.empty(apart + tensor[0].numel(), dtype=torch.float16, device=DEVICE)
        strides = apart, *tensor.stride()[1:]
        far.append(store.as_strided(tensor.shape, strides).copy_(tensor.detach()).requires_grad_())
    assert_equal(step(far, mask_seed=1), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_equals_eager(mode):
    tensors = make()

    @torch.compile(fullgraph=True, mode=mode)
    def compiled(query, mirrored, key, value, seed):
        return dual_branch_attention(query, mirrored, key, value, mask_ratio=0.4, mask_seed=seed, backend=BACKEND)

    for value in (1, 2, 3):
        seed = torch.tensor(value, device=DEVICE)
        outs = compiled(*tensors, seed)
        results = copies([*outs, *torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs])])
        eager = make()
        outs = dual_branch_attention(*eager, mask_ratio=0.4, mask_seed=value, backend=BACKEND)
        grads = torch.autograd.grad(outs, eager, [torch.ones_like(out) for out in outs])
        torch.testing.assert_close(results, copies([*outs, *grads]))


def test_autocast_computes_in_its_dtype():
    query, _, key, value = make()
    with torch.autocast("cuda", torch.bfloat16):
        out = fused_masked_attention(query, key, value, mask_ratio=0.4, mask_seed=1, backend=BACKEND)
    assert out.dtype == torch.bfloat16
    query, key, value = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(out, fused_masked_attention(query, key, value, mask_ratio=0.4, mask_seed=1, backend=BACKEND))


class Model(nn.Module):
    """torch's decoder with our attention to the memory, and a head for predicates that has a mirror."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(64, 2, 96, dropout=0.0, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(64, 7)
        replace_attention(self.decoder, "multihead_attn")
        self.align = RelationAlignment(mask_ratio=0.4, heads={"predicate": self.head})

    def forward(self, queries, memory, checkpointed=False):
        for layer in self.decoder.layers:
            if checkpointed:
                queries = checkpoint(layer, queries, memory, use_reentrant=False)
            else:
                queries = layer(queries, memory)
        return queries

    def step(self, queries, memory, checkpointed):
        """Return the hidden states of both branches, the loss, and the gradients of all parameters and inputs."""
        with self.align.mirror(self.decoder, step=3) as mirror:
            hidden, mirrored = mirror.both(lambda x: self(x, memory, checkpointed), queries)
        logits = self.head(hidden)
        aligned = mirror.loss(predicate=(logits, self.align.heads["predicate"](mirrored)))
        loss = 100 * (logits.square().mean() + aligned)  # makes the gradient of the memory larger than the tolerance
        return [hidden, mirrored, loss, *torch.autograd.grad(loss, [queries, memory, *self.parameters()])]


@pytest.mark.parametrize("variant", ["plain", "checkpointed", "compiled", "checkpointed and compiled"])
def test_mirror_of_the_device_equals_the_mirror_of_the_cpu(variant):
    if variant == "checkpointed and compiled" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 compiles checkpointed layers again up to its limit")
    model = Model()
    inputs = [torch.randn(2, length, 64, requires_grad=True) for length in (40, 300)]
    expected = model.step(*inputs, checkpointed=False)
    model = copy.deepcopy(model).to(DEVICE)
    for layer in model.decoder.layers:
        layer.multihead_attn.backend = BACKEND
        if "compiled" in variant:
            layer.compile(fullgraph=True)
    inputs = [tensor.detach().to(DEVICE).requires_grad_() for tensor in inputs]
    found = [result.cpu() for result in model.step(*inputs, checkpointed="checkpointed" in variant)]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
