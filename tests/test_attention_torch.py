"""Attention with torch's features: operator checks, compilation, export, autocast, checkpointing and errors."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sgalign import attention_weights, dual_branch_attention, fused_masked_attention
from sgalign.ops import backends

SHAPE = (2, 2, 5, 40, 8)  # B, H, Lq, Lk, D
OPTIONS = {"mask_ratio": 0.4, "dropout_p": 0.2}


def make(dtype=torch.float32, requires_grad=False):
    """Return query, mirrored query, key and value."""
    batch, heads, queries, keys, dim = SHAPE
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, heads, n, dim, generator=generator).to(dtype) for n in (queries, queries, keys, keys)]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def gradients(outs, tensors):
    loss = sum((out.float() * torch.arange(out.numel()).view_as(out).cos()).sum() for out in outs)
    return torch.autograd.grad(loss, tensors, allow_unused=True)


# ------------------------------------------------------------------------------------------------------ operators


def arguments(queries, options):
    mask = torch.arange(40).expand(2, 2, 5, 40) % 7 == 0
    padding = torch.arange(40).expand(2, 40) > 30
    seed = torch.tensor(3)
    return (mask, padding, seed, 0.3, 0.2, 1, 0.3) if options else (None, None, None, 0.0, 0.0, 0, 0.3)


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("kind", ["single", "dual", "same query"])
@pytest.mark.parametrize("strided", [False, True])
def test_attention_operators_pass_opcheck(kind, options, strided):
    first, second, key, value = (tensor.mT.contiguous().mT if strided else tensor for tensor in make())
    branches = 1 if kind == "single" else 2
    queries = [first, second] if kind == "dual" else [first]
    options = arguments(queries, options)
    forward = ("cpu", queries, branches, key, value, *options)
    torch.library.opcheck(torch.ops.sgalign.attention, forward)
    outputs = torch.ops.sgalign.attention(*forward)
    outs, logsumexps = outputs[:branches], outputs[branches:]
    grad_outs = [out.cos() for out in outs]
    backward = ("cpu", grad_outs, queries, outs, logsumexps, key, value, *options)
    torch.library.opcheck(torch.ops.sgalign.attention_backward, backward)


@pytest.mark.parametrize("sizes", [(2, 3, 4, 300), (1, 1, 0, 5)])
def test_random_mask_operator_passes_opcheck(sizes):
    torch.library.opcheck(torch.ops.sgalign.random_mask, ("cpu", torch.tensor(3), *sizes, 0.3, 1))


# ------------------------------------------------------------------------------------------------ compile and export


def attend_single(query, mirrored_query, key, value, seed, padding):
    options = OPTIONS | {"mask_seed": seed, "key_padding_mask": padding}
    return (fused_masked_attention(2 * mirrored_query, key, value, **options),)


def attend_dual(query, mirrored_query, key, value, seed, padding):
    options = OPTIONS | {"mask_seed": seed, "key_padding_mask": padding, "mask": padding[:, None, None]}
    return dual_branch_attention(2 * query, mirrored_query, key, value, **options)


def attend_same_query(query, mirrored_query, key, value, seed, padding):
    query = query + mirrored_query
    return dual_branch_attention(query, query, key, value, mask_seed=seed, key_padding_mask=padding, **OPTIONS)


def attend_repeated(query, mirrored_query, key, value, seed, padding):
    """Attend with one tensor in several roles, as in self-attention."""
    outs = fused_masked_attention(key, key, key, mask_seed=seed, key_padding_mask=padding, **OPTIONS)
    return outs, *dual_branch_attention(query, mirrored_query, value, value, mask_seed=seed, **OPTIONS)


def compare_compiled(attend, backend, seed):
    torch.compiler.reset()
    padding = torch.arange(40).expand(2, 40) > 30
    tensors = make(requires_grad=True)
    outs = attend(*tensors, seed, padding)
    compiled = torch.compile(attend, backend=backend, fullgraph=True)(*tensors, seed, padding)
    torch.testing.assert_close(compiled, outs)
    torch.testing.assert_close(gradients(compiled, tensors), gradients(outs, tensors))


@pytest.mark.parametrize("attend", [attend_single, attend_dual, attend_same_query, attend_repeated])
@pytest.mark.parametrize("seed", [11, torch.tensor(11)], ids=["int", "tensor"])
def test_compiled_equals_eager(attend, seed):
    compare_compiled(attend, "aot_eager", seed)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager():
    compare_compiled(attend_dual, "inductor", torch.tensor(11))


@pytest.mark.parametrize("attend", [attend_single, attend_dual, attend_same_query])
def test_compiled_equals_eager_without_gradients(attend):
    torch.compiler.reset()
    padding = torch.arange(40).expand(2, 40) > 30
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*make(), 11, padding), attend(*make(), 11, padding))
    with torch.no_grad():
        tensors = make(requires_grad=True)
        torch.testing.assert_close(compiled(*tensors, 11, padding), attend(*tensors, 11, padding))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled_equals_eager_for_dynamic_shapes(requires_grad):
    torch.compiler.reset()
    compiled = torch.compile(dual_branch_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (4, 9, 300):
        tensors = [torch.randn(2, 3, n, 8, requires_grad=requires_grad) for n in (5, 5, length, length)]
        expected = dual_branch_attention(*tensors, mask_ratio=0.3, mask_seed=1)
        torch.testing.assert_close(compiled(*tensors, mask_ratio=0.3, mask_seed=1), expected)


@pytest.mark.parametrize("attend", [attend_single, attend_same_query])
def test_compiled_draws_a_new_mask_in_each_call(attend):
    torch.compiler.reset()
    padding = torch.zeros(2, 40, dtype=torch.bool)
    tensors = make(requires_grad=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)

    def call():
        outs = compiled(*tensors, None, padding)
        return outs[-1], gradients(outs, tensors)[2]  # the gradient needs the forward's seed

    torch.manual_seed(0)
    first, second = call(), call()
    assert not torch.allclose(first[0], second[0])
    torch.manual_seed(0)
    torch.testing.assert_close([call(), call()], [first, second])
    torch.manual_seed(0)
    outs = attend(*tensors, None, padding)
    torch.testing.assert_close((outs[-1], gradients(outs, tensors)[2]), first)


class Block(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
        self.seed = seed

    def forward(self, query, key):
        query = self.project(query)
        out, mirrored_out = dual_branch_attention(query, query, key, key, mask_ratio=0.5, mask_seed=self.seed)
        return out + 2 * mirrored_out


def test_exported_module_equals_the_module():
    query, _, key, _ = make()
    block = Block(seed=5)
    exported = torch.export.export(block, (query, key))
    assert any("sgalign" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(query, key), block(query, key))


def test_exported_module_takes_other_lengths_and_draws_new_seeds():
    query, _, key, _ = make()
    keys = torch.export.Dim("keys", min=2, max=4096)
    block = Block(seed=None)
    exported = torch.export.export(block, (query, key), dynamic_shapes=({}, {2: keys})).module()
    key = torch.randn(2, 2, 300, 8)
    torch.manual_seed(0)
    expected = block(query, key)
    torch.manual_seed(0)
    torch.testing.assert_close(exported(query, key), expected)
    assert not torch.allclose(exported(query, key), expected)


# ------------------------------------------------------------------------------------- autocast and checkpointing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_with_gradients_in_float32(dtype):
    tensors = make(requires_grad=True)
    with torch.autocast("cpu", dtype):
        outs = dual_branch_attention(*tensors, mask_ratio=0.4, mask_seed=3)
    expected = dual_branch_attention(*(tensor.to(dtype) for tensor in tensors), mask_ratio=0.4, mask_seed=3)
    assert all(out.dtype == dtype for out in outs)
    assert all(map(torch.equal, outs, expected))
    grads = gradients(outs, tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(map(torch.equal, grads, gradients(expected, tensors)))


def test_autocast_recognizes_one_query_for_both_branches():
    query, _, key, value = make(requires_grad=True)
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "sgalign":
                seen.append((function._schema.name, [len(arg) for arg in args if isinstance(arg, (list, tuple))]))
            return function(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Spy():
        outs = dual_branch_attention(query, query, key, value)
    with Spy():
        grads = gradients(outs, (query, key, value))
    # The forward takes one query. The backward takes two gradients of outputs, one query, two outputs and two
    # log-sum-exps.
    assert seen == [("sgalign::attention", [1]), ("sgalign::attention_backward", [2, 1, 2, 2])]
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_autocast_casts_inputs_of_different_dtypes():
    query, _, key, value = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_masked_attention(query.bfloat16(), key, value.half()).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone():
    query, _, key, value = make()
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_masked_attention(query.double(), key.double(), value.double())
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), fused_masked_attention(query, key, value))


def test_autocast_refuses_a_float64_query_with_float32_keys():
    query, _, key, value = make()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="key must have the query's dtype"):
        fused_masked_attention(query.double(), key, value)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_mask(use_reentrant):
    tensors = make(requires_grad=True)

    def attend(*tensors):
        return dual_branch_attention(*tensors, **OPTIONS)

    torch.manual_seed(0)
    outs = attend(*tensors)
    expected = gradients(outs, tensors)
    torch.manual_seed(0)
    again = checkpoint(attend, *tensors, use_reentrant=use_reentrant)
    torch.rand(3)  # the generator has moved on by the time of the backward
    loss = sum((out * torch.arange(out.numel()).view_as(out).cos()).sum() for out in again)
    loss.backward()
    assert all(map(torch.equal, again, outs))
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip(tensors, expected))


# ------------------------------------------------------------------------------------------------ memory and masks


@pytest.mark.parametrize("shape", [(40,), (5, 1), (1, 1, 1, 40), (2, 1, 5, 40)])
@pytest.mark.parametrize("compiled", [False, True])
def test_mask_is_saved_for_the_backward_in_the_size_it_was_given(shape, compiled):
    torch.compiler.reset()
    mask = torch.rand(shape) < 0.3
    attend = (
        torch.compile(dual_branch_attention, backend="aot_eager", fullgraph=True) if compiled else dual_branch_attention
    )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        attend(*make(requires_grad=True), mask=mask)
    assert sum(tensor.numel() for tensor in saved if tensor.dtype == torch.bool) == mask.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("options", [{}, OPTIONS | {"mask_seed": 4, "mask_stream": 3, "scale": -0.7}])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_times_values_are_the_output(dtype, options, masked):
    query, _, key, value = make(dtype)
    if masked:
        mask = torch.rand(5, 40) < 0.2
        mask[2] = True
        options = options | {"mask": mask, "key_padding_mask": torch.arange(40).expand(2, 40) > 33}
    weights = attention_weights(query, key, **options)
    assert weights.shape == (2, 2, 5, 40) and weights.dtype == dtype
    close = {"rtol": 0, "atol": 2e-3} if dtype == torch.float16 else {}
    torch.testing.assert_close(weights @ value, fused_masked_attention(query, key, value, **options), **close)
    if masked:
        assert not weights[:, :, 2].any() and not weights[..., 34:].any()


def test_attention_weights_are_differentiable_and_checked():
    query, _, key, _ = make(torch.float64, requires_grad=True)
    query, key = query[:1, :1, :2, :3], key[:1, :1, :4, :3]
    assert torch.autograd.gradcheck(lambda *x: attention_weights(*x, mask_ratio=0.5, mask_seed=1), (query, key))
    with pytest.raises(ValueError, match=r"key must be \[1, 1, 4, 3\]"):
        attention_weights(query, key[..., :2])
    with pytest.raises(ValueError, match="mask_stream must be in"):
        attention_weights(query, key, mask_stream=-1)


# ------------------------------------------------------------------------------------------------------ transforms


def test_torch_func_grad_equals_autograd():
    query, _, key, value = make()
    grad = torch.func.grad(lambda query: fused_masked_attention(query, key, value).square().sum())(query)
    query.requires_grad_()
    (expected,) = torch.autograd.grad(fused_masked_attention(query, key, value).square().sum(), query)
    torch.testing.assert_close(grad, expected)


def test_forward_mode_is_refused():
    query, _, key, value = make()
    with pytest.raises(NotImplementedError, match="jvp"):  # torch.compile does not accept a clearer error
        torch.func.jvp(lambda query: fused_masked_attention(query, key, value), (query,), (query,))


@pytest.mark.parametrize("dual", [False, True])
def test_second_order_gradients_are_refused(dual):
    query, mirrored_query, key, value = make(requires_grad=True)
    out = (
        dual_branch_attention(query, mirrored_query, key, value)
        if dual
        else [fused_masked_attention(query, key, value)]
    )
    (grad,) = torch.autograd.grad(sum(o.square().sum() for o in out), query, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order.*backend='reference'"):
        grad.sum().backward()


def test_reference_has_second_order_gradients():
    query, _, key, value = make(torch.float64, requires_grad=True)
    query, key, value = (tensor[:1, :1, :2, :3].detach().requires_grad_() for tensor in (query, key, value))
    assert torch.autograd.gradgradcheck(
        lambda *tensors: fused_masked_attention(*tensors, backend="reference"), (query, key, value)
    )


# ----------------------------------------------------------------------------------------------------------- errors

BOOL = {"dtype": torch.bool}
BAD_OPTIONS = [
    ({"mask": torch.zeros(4, 40, **BOOL)}, ValueError, r"mask must be broadcastable to \[2, 2, 5, 40\], got \[4, 40\]"),
    ({"mask": torch.zeros(1, 1, 1, 1, 1, **BOOL)}, ValueError, r"mask must be broadcastable .* got \[1, 1, 1, 1, 1\]"),
    ({"mask": torch.zeros(5, 40)}, TypeError, "mask must be a bool tensor.* got torch.float32"),
    ({"mask": [[True]]}, TypeError, "mask must be a bool tensor.* got list"),
    (
        {"mask": torch.zeros(5, 40, device="meta", **BOOL)},
        ValueError,
        "mask must be on the query's device cpu, got meta",
    ),
    ({"key_padding_mask": torch.zeros(2, 39, **BOOL)}, ValueError, r"key_padding_mask .* \[2, 40\], got \[2, 39\]"),
    ({"key_padding_mask": torch.zeros(1, 40, **BOOL)}, ValueError, r"key_padding_mask .* \[2, 40\], got \[1, 40\]"),
    ({"key_padding_mask": torch.zeros(2, 40)}, TypeError, "key_padding_mask must be a bool tensor.* got torch.float32"),
    ({"mask_ratio": -0.1}, ValueError, r"mask_ratio must be in \[0, 1\], got -0.1"),
    ({"mask_ratio": 1.1}, ValueError, r"mask_ratio must be in \[0, 1\], got 1.1"),
    ({"mask_ratio": math.nan}, ValueError, r"mask_ratio must be in \[0, 1\], got nan"),
    ({"mask_ratio": "0.5"}, TypeError, "mask_ratio must be .* got str"),
    ({"dropout_p": 1.1}, ValueError, r"dropout_p must be in \[0, 1\], got 1.1"),
    ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\], got nan"),
    ({"mask_stream": -1}, ValueError, r"mask_stream must be in \[0, 2\*\*31\), got -1"),
    ({"mask_stream": 2**31}, ValueError, r"mask_stream must be in \[0, 2\*\*31\), got 2147483648"),
    ({"mask_stream": True}, TypeError, "mask_stream must be an int, got bool"),
    ({"mask_stream": 1.0}, TypeError, "mask_stream must be an int, got float"),
    ({"mask_seed": 1.0}, TypeError, "mask_seed must be an int, an int64 tensor or None, got float"),
    ({"mask_seed": 1.0, "mask_ratio": 0.0}, TypeError, "mask_seed must be an int, an int64 tensor or None, got float"),
    ({"mask_seed": True}, TypeError, "mask_seed must be an int, an int64 tensor or None, got bool"),
    ({"mask_seed": torch.tensor(1.0)}, TypeError, "mask_seed must hold one int64, got torch.float32"),
    ({"mask_seed": torch.tensor([1, 2])}, TypeError, r"mask_seed must hold one int64, got .* \[2\]"),
    ({"mask_seed": torch.tensor(1, device="meta")}, ValueError, "mask_seed must be on cpu, got meta"),
    ({"mask_seed": 2**63}, ValueError, r"mask_seed must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
    ({"mask_seed": -(2**63) - 1}, ValueError, r"mask_seed must be in .* got -9223372036854775809"),
    ({"scale": math.nan}, ValueError, "scale must be finite and at most .*, got nan"),
    ({"scale": -math.inf}, ValueError, "scale must be finite and at most .*, got -inf"),
    ({"scale": 1e39}, ValueError, r"scale must be finite and at most .*e\+38 in absolute value, got 1e\+39"),
    ({"mask": torch.zeros(5, 40, **BOOL).to_sparse()}, TypeError, "mask must be a dense tensor, got torch.sparse_coo"),
    ({"backend": ["cpu"]}, ValueError, r"backend must be one of .* got \['cpu'\]"),
    ({"backend": "gpu"}, ValueError, "backend must be one of 'cpu', 'triton', 'cuda', 'reference' or None, got 'gpu'"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options, error, message", BAD_OPTIONS)
def test_bad_options_are_refused_by_name(options, error, message, backend):
    query, mirrored_query, key, value = make()
    options = {"mask_ratio": 0.5, "backend": backend} | options
    for call in (
        lambda: fused_masked_attention(query, key, value, **options),
        lambda: dual_branch_attention(query, mirrored_query, key, value, **options),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scale_may_be_any_real_number(backend):
    query, _, key, value = make()
    attend = functools.partial(fused_masked_attention, query, key, value, backend=backend)
    assert torch.equal(attend(scale=Fraction(1, 4)), attend(scale=0.25))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_keys_give_zeros_and_zero_gradients(backend):
    """This holds even if the query is NaN."""
    query = torch.full((1, 2, 3, 4), math.nan, requires_grad=True)
    key, value = torch.ones(2, 1, 2, 0, 4, requires_grad=True)
    out = fused_masked_attention(query, key, value, backend=backend)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert not out.any() and not any(grad.any() for grad in grads)


def test_compiled_call_of_cuda_without_a_gpu_is_refused():
    """A compiled call checks the backend when it runs, while an eager call checks it first."""
    query, _, key, value = make()
    compiled = torch.compile(functools.partial(fused_masked_attention, backend="cuda"), backend="aot_eager")
    with pytest.raises((ImportError, ValueError), match="backend 'cuda' (cannot be used|needs tensors on a GPU)"):
        compiled(query, key, value)


BAD_TENSORS = [
    ("query", lambda x: x[0], ValueError, r"query must be \[B, H, L, D\], got 3 dimensions: \[2, 5, 8\]"),
    ("key", lambda x: x[None], ValueError, "key must be .* got 5 dimensions"),
    ("value", lambda x: x.to_sparse(), TypeError, "value must be a dense tensor, got torch.sparse_coo"),
    ("query", lambda x: x.int(), TypeError, "query must be float32, .* got torch.int32"),
    ("value", lambda x: x.to(torch.complex64), TypeError, "value must be float32, .* got torch.complex64"),
    ("query", lambda x: x.tolist(), TypeError, "query must be a tensor, got list"),
    ("key", lambda x: None, TypeError, "key must be a tensor, got NoneType"),
    ("key", lambda x: x[:1], ValueError, r"key must be \[2, 2, 40, 8\] .* got \[1, 2, 40, 8\]"),
    ("key", lambda x: x[:, :1], ValueError, r"key must be \[2, 2, 40, 8\] .* got \[2, 1, 40, 8\]"),
    ("key", lambda x: x[..., :7], ValueError, r"key must be \[2, 2, 40, 8\] .* got \[2, 2, 40, 7\]"),
    ("value", lambda x: x[:, :, 1:], ValueError, r"value must be \[2, 2, 40, 8\] .* got \[2, 2, 39, 8\]"),
    ("value", lambda x: x[..., 1:], ValueError, r"value must be \[2, 2, 40, 8\] .* got \[2, 2, 40, 7\]"),
    (
        "mirrored_query",
        lambda x: x[:, :, 1:],
        ValueError,
        r"mirrored_query must be \[2, 2, 5, 8\] .* got \[2, 2, 4, 8\]",
    ),
    ("mirrored_query", lambda x: x.half(), TypeError, "mirrored_query must have .* torch.float32, got torch.float16"),
    ("key", lambda x: x.double(), TypeError, "key must have the query's dtype torch.float32, got torch.float64"),
    ("value", lambda x: x.bfloat16(), TypeError, "value must have the query's dtype torch.float32, got torch.bfloat16"),
    (
        "mirrored_query",
        lambda x: x.to("meta"),
        ValueError,
        "mirrored_query must be on the query's device cpu, got meta",
    ),
    ("key", lambda x: x.to("meta"), ValueError, "key must be on the query's device cpu, got meta"),
    ("value", lambda x: x.to("meta"), ValueError, "value must be on the query's device cpu, got meta"),
    ("query", lambda x: x.to("meta"), ValueError, "mirrored_query must be on the query's device meta, got cpu"),
]


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name, change, error, message", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(name, change, error, message, backend):
    tensors = dict(zip(("query", "mirrored_query", "key", "value"), make()))
    tensors[name] = change(tensors[name])
    with pytest.raises(error, match=f"^{message}"):
        dual_branch_attention(**tensors, backend=backend)


def test_missing_mirrored_query_is_refused_by_name():
    query, _, key, value = make()
    with pytest.raises(TypeError, match="mirrored_query must be a tensor, got NoneType"):
        dual_branch_attention(query, None, key, value)


def test_more_than_256_channels_are_refused():
    tensor = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match=r"query must have at most 256 channels per head \(D\), got 257"):
        fused_masked_attention(tensor, tensor, tensor)


def test_gpus_older_than_8_0_get_the_reference(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda device: (7, 5))
    assert backends.choose(None, gpu, torch.float16) == "reference"
    with pytest.raises(ValueError, match=r"'triton' needs compute capability 8.0 or higher, but cuda:0 has 7.5"):
        backends.choose("triton", gpu, torch.float16)
    assert backends.unavailable("triton") == "needs compute capability 8.0 or higher, but cuda has 7.5"
    monkeypatch.setattr(backends, "_capability", lambda device: (8, 6))
    assert backends.choose(None, gpu, torch.float16) == "triton" and backends.unavailable("triton") is None


def test_cpu_backend_refuses_tensors_of_another_device():
    tensor = torch.zeros(1, 1, 2, 4, device="meta")
    with pytest.raises(ValueError, match="backend 'cpu' needs tensors on the CPU, got meta"):
        fused_masked_attention(tensor, tensor, tensor, backend="cpu")
