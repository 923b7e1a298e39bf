"""`MaskedMultiheadAttention`, compared with torch's `MultiheadAttention`, and its mirrored branch."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import sgalign
from sgalign.nn import MaskedMultiheadAttention

E, H = 24, 4


def pair(**options):
    """Return torch's module, and ours with the same weights."""
    theirs = nn.MultiheadAttention(E, H, **options)
    ours = MaskedMultiheadAttention(E, H, **options)
    nn.init.normal_(theirs.in_proj_bias) if theirs.in_proj_bias is not None else None
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 6}])
@pytest.mark.parametrize("batched", [True, False])
def test_outputs_equal_those_of_torchs_module(options, batched):
    theirs, ours = pair(**options)
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)
    shape = (lambda length: (3, length)) if options.get("batch_first") else (lambda length: (length, 3))
    shape = shape if batched else (lambda length: (length,))
    query, key, value = torch.randn(*shape(5), E), torch.randn(*shape(7), kdim), torch.randn(*shape(7), vdim)
    padding = torch.tensor([[0, 0, 0, 1, 0, 0, 1]] * 3, dtype=torch.bool)[slice(None) if batched else 0]
    mask = torch.rand(3 * H if batched else H, 5, 7) < 0.3
    mask[..., 0] = False  # because torch gives NaN for a row without any kept entry
    expected, _ = theirs(query, key, value, key_padding_mask=padding, attn_mask=mask)
    out, weights = ours(query, key, value, key_padding_mask=padding, attn_mask=mask)
    assert weights is None and out.shape == expected.shape
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    out, _ = ours(query, key, value, attn_mask=mask[0])
    torch.testing.assert_close(out, theirs(query, key, value, attn_mask=mask[0])[0], atol=1e-5, rtol=1e-4)


SIZES = [{}, {"kdim": E + 2, "vdim": E + 4}, {"bias": False}]


@pytest.mark.parametrize("sizes", SIZES)
def test_initial_values_equal_those_of_torchs_module(sizes):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **sizes).state_dict()
    torch.manual_seed(0)
    ours = MaskedMultiheadAttention(E, H, **sizes).state_dict()
    assert list(theirs) == list(ours)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("sizes", SIZES)
def test_state_dict_loads_into_torchs_module_and_back(sizes):
    theirs, ours = nn.MultiheadAttention(E, H, **sizes), MaskedMultiheadAttention(E, H, **sizes)
    theirs_state, ours_state = theirs.state_dict(), ours.state_dict()
    theirs.load_state_dict(ours_state)
    ours.load_state_dict(theirs_state)


@pytest.mark.parametrize("same", [True, False])
def test_dual_branch_masks_the_mirror_alone(same):
    module = MaskedMultiheadAttention(E, H, mask_ratio=0.4, batch_first=True).double()
    query, other, memory = (torch.randn(2, length, E, dtype=torch.float64) for length in (5, 5, 300))
    mirrored_query = query if same else other
    out, mirrored = module.dual_branch(query, mirrored_query, memory, memory, mask_seed=3, mask_stream=2)
    expected_mirrored, _ = module(mirrored_query, memory, memory, mask_seed=3, mask_stream=2)
    torch.testing.assert_close(mirrored, expected_mirrored)
    assert not torch.allclose(out, mirrored)
    module.eval()
    expected, _ = module(query, memory, memory)
    torch.testing.assert_close(out, expected)


def test_dual_branch_masks_nothing_in_evaluation():
    module = MaskedMultiheadAttention(E, H, mask_ratio=0.4, batch_first=True).double().eval()
    query, memory = (torch.randn(2, length, E, dtype=torch.float64) for length in (5, 300))
    expected, _ = module(query, memory, memory)
    for out in module.dual_branch(query, query, memory, memory):
        torch.testing.assert_close(out, expected)


def test_gradients_reach_every_weight():
    module = MaskedMultiheadAttention(E, H, dropout=0.1, mask_ratio=0.1)
    query, memory = torch.randn(5, 2, E), torch.randn(9, 2, E)
    sum(out.square().sum() for out in module.dual_branch(query, query, memory, memory)).backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in module.named_parameters() if "bias" not in name)


def test_merging_the_heads_needs_no_copy():
    module = MaskedMultiheadAttention(E, H, batch_first=True)
    heads = module._split_heads(torch.randn(2, 5, E))
    out = sgalign.fused_masked_attention(heads, heads, heads)
    assert out.transpose(1, 2).is_contiguous()


def test_bad_arguments_of_the_module_are_refused_by_name():
    with pytest.raises(ValueError, match="num_heads must divide embed_dim"):
        MaskedMultiheadAttention(10, 3)
    for name, value in (("num_heads", 2.0), ("num_heads", True), ("kdim", 0), ("vdim", -1), ("backend", "cudnn")):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
            MaskedMultiheadAttention(**{"embed_dim": E, "num_heads": H} | {name: value})


def test_bad_input_with_batch_in_the_middle_is_refused_by_name():
    module = MaskedMultiheadAttention(E, H)
    tensor = torch.randn(5, 2, E)
    with pytest.raises(ValueError, match="need_weights must be False, got True.*method attention_weights"):
        module(tensor, tensor, tensor, need_weights=True)
    with pytest.raises(ValueError, match=rf"key must be \[L, B, {E}\]"):
        module(tensor, tensor[0], tensor)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        module(tensor, tensor, tensor, attn_mask=torch.zeros(5, 5, dtype=torch.uint8))
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        module([1.0], tensor, tensor)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(3, 5, E + 1)}, ValueError, rf"query must be \[B, L, {E}\].* got \[3, 5, {E + 1}\]"),
        ({"value": torch.zeros(7, E)}, ValueError, rf"value must be \[B, L, {E}\].* got \[7, {E}\]"),
        ({"attn_mask": torch.zeros(3, 5, 7).int()}, TypeError, "attn_mask must be a bool tensor.* got torch.int32"),
        (
            {"attn_mask": torch.full((5, 7), -1e9)},
            ValueError,
            r"attn_mask must be bool .*, got -1000000000",
        ),
        ({"attn_mask": torch.full((5, 7), math.nan)}, ValueError, "attn_mask must be bool .* got nan"),
        ({"key_padding_mask": torch.ones(3, 7)}, ValueError, "key_padding_mask must be bool .* got 1.0"),
        ({"key_padding_mask": torch.zeros(3, 6)}, ValueError, r"key_padding_mask must be \[3, 7\], got \[3, 6\]"),
        ({"attn_mask": torch.zeros(H + 1, 5, 7) > 0}, ValueError, rf"attn_mask must be .* got \[{H + 1}, 5, 7\]"),
        ({"attn_mask": torch.zeros(H, 5, 7) > 0}, ValueError, rf"or \[{3 * H}, 5, 7\] .* got \[{H}, 5, 7\]"),
        ({"attn_mask": torch.zeros(1, 7) > 0}, ValueError, r"attn_mask must be \[5, 7\] or .* got \[1, 7\]"),
        ({"is_causal": True}, ValueError, "attn_mask must be given if is_causal is True"),
    ],
)
def test_bad_input_with_batch_first_is_refused_by_name(change, error, message):
    arguments = {"query": torch.zeros(3, 5, E), "key": torch.zeros(3, 7, E), "value": torch.zeros(3, 7, E)} | change
    with pytest.raises(error, match=message):
        MaskedMultiheadAttention(E, H, batch_first=True)(**arguments)


def test_missing_tensors_are_refused_by_name():
    module, x = MaskedMultiheadAttention(E, H), torch.randn(5, 2, E)
    for arguments, name in (((None, x, x), "query"), ((x, None, x), "key"), ((x, x, None), "value")):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
            module(*arguments)
    with pytest.raises(TypeError, match="mirrored_query must be a tensor, got NoneType"):
        module.dual_branch(x, None, x, x)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[5\], got \[4\]"):
        module(x[:, 0], x[:, 0], x[:, 0], key_padding_mask=torch.zeros(4) > 0)
    with pytest.raises(ValueError, match="attn_mask must be on the query's device"):
        module(x, x, x, attn_mask=torch.zeros(5, 5, device="meta") > 0)


def test_bad_ratios_are_refused_when_the_module_is_made():
    for name in ("mask_ratio", "dropout"):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            MaskedMultiheadAttention(E, H, **{name: 2})


def replaced(layer):
    """Return a copy of a transformer layer of torch whose attention is ours, with the same weights."""
    ours = copy.deepcopy(layer)
    for name in ("self_attn", "multihead_attn"):
        if hasattr(layer, name):
            setattr(ours, name, MaskedMultiheadAttention(E, H, batch_first=True))
            getattr(ours, name).load_state_dict(getattr(layer, name).state_dict())
    return ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_module_can_replace_the_attention_of_a_transformer_encoder(training, masked):
    theirs = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    ours = replaced(theirs)
    x = torch.randn(3, 5, E)
    masks = {}
    if masked:
        masks = {"mask": torch.ones(5, 5).triu(1) > 0, "src_key_padding_mask": torch.arange(5).expand(3, 5) > 3}
    for make in (lambda layer: layer, lambda layer: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)):
        by_ours, by_theirs = make(ours).train(training), make(theirs).train(training)
        given = {"src_mask" if name == "mask" and by_ours is ours else name: mask for name, mask in masks.items()}
        torch.testing.assert_close(by_ours(x, **given), by_theirs(x, **given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_module_can_replace_the_attention_of_a_transformer_decoder(training):
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2)
    ours = copy.deepcopy(theirs)
    ours.layers = nn.ModuleList(replaced(layer) for layer in theirs.layers)
    x, memory = torch.randn(3, 5, E), torch.randn(3, 7, E)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),  # holds floats
        "memory_mask": torch.rand(5, 7) < 0.2,
        "tgt_key_padding_mask": torch.where(torch.arange(5).expand(3, 5) > 3, -math.inf, 0.0),
        "memory_key_padding_mask": torch.arange(7).expand(3, 7) > 5,
    }
    masks["memory_mask"][:, 0] = False
    by_ours, by_theirs = ours.train(training), theirs.train(training)
    torch.testing.assert_close(by_ours(x, memory, **masks), by_theirs(x, memory, **masks), atol=1e-5, rtol=1e-4)
    compiled = torch.compile(by_ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, memory, **masks), by_theirs(x, memory, **masks), atol=1e-5, rtol=1e-4)
    masks["memory_mask"] = torch.zeros(5, 7).normal_()
    with pytest.raises(RuntimeError, match="attn_mask must be bool .*, or hold only 0"):
        compiled(x, memory, **masks)


def test_encoder_needs_no_nested_tensors():
    """torch's encoder makes nested tensors of padded input, if it was made with torch's attention."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, E), torch.arange(5).expand(3, 5) > 3
    encoder.use_nested_tensor = False
    expected = encoder(x, src_key_padding_mask=padding)
    for layer in encoder.layers:
        layer.self_attn = replaced(layer).self_attn
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-4)
        encoder.use_nested_tensor = True
        with pytest.raises(TypeError, match="query must be a dense tensor, got nested"):
            encoder(x, src_key_padding_mask=padding)


def test_vmap_of_float_masks_needs_the_reference_alone():
    module = MaskedMultiheadAttention(E, H, backend="reference").eval()
    x, masks = torch.randn(5, E), torch.where(torch.rand(3, 5, 5) < 0.3, -math.inf, 0.0)
    found = torch.func.vmap(lambda mask: module(x, x, x, attn_mask=mask)[0])(masks)
    torch.testing.assert_close(found, torch.stack([module(x, x, x, attn_mask=mask)[0] for mask in masks]))
    with pytest.raises(ValueError, match="attn_mask must be bool .* got 1.0"):
        torch.func.vmap(lambda mask: module(x, x, x, attn_mask=mask)[0])(torch.ones(3, 5, 5))


# --------------------------------------------------------------------------------- weights, sizes and initialization


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_attention_weights_equal_those_of_torchs_module(batch_first, batched, average):
    theirs, ours = pair(batch_first=batch_first, kdim=10, vdim=6)
    shape = (lambda length: (3, length)) if batch_first else (lambda length: (length, 3))
    shape = shape if batched else (lambda length: (length,))
    query, key, value = torch.randn(*shape(5), E), torch.randn(*shape(7), 10), torch.randn(*shape(7), 6)
    padding = torch.tensor([[0, 0, 0, 1, 0, 0, 1]] * 3, dtype=torch.bool)[slice(None) if batched else 0]
    mask = torch.rand(5, 7) < 0.3
    mask[:, 0] = False
    masks = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": average}
    _, expected = theirs(query, key, value, **masks)
    weights = ours.attention_weights(query, key, **masks)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


def test_attention_weights_are_those_of_the_same_call():
    module = MaskedMultiheadAttention(E, H, batch_first=True, mask_ratio=0.4, dropout=0.2).double()
    query, memory = (torch.randn(2, length, E, dtype=torch.float64) for length in (5, 40))
    seeds = {"mask_seed": 3, "mask_stream": 2}
    weights = module.attention_weights(query, memory, average_attn_weights=False, **seeds)
    assert 0.4 < (weights == 0).double().mean() < 0.64
    values = module._split_heads(
        nn.functional.linear(memory, *(x.chunk(3)[2] for x in (module.in_proj_weight, module.in_proj_bias)))
    )
    expected, _ = module(query, memory, memory, **seeds)
    torch.testing.assert_close(module.out_proj(module._merge_heads(weights @ values, True)), expected)


def test_any_integer_is_a_size():
    module = MaskedMultiheadAttention(np.int64(E), np.int32(H), kdim=np.uint8(10), vdim=torch.tensor(6))
    assert [type(size) for size in (module.embed_dim, module.num_heads, module.kdim, module.vdim)] == [int] * 4
    assert module(torch.randn(5, E), torch.randn(7, 10), torch.randn(7, 6))[0].shape == (5, E)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["reset_parameters", "_reset_parameters"])
def test_module_from_the_meta_device_gets_the_initial_values(sizes, name):
    torch.manual_seed(0)
    expected = nn.MultiheadAttention(E, H, **sizes).state_dict()
    module = MaskedMultiheadAttention(E, H, **sizes, device="meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)
    torch.manual_seed(0)
    getattr(module, name)()
    for key, tensor in expected.items():
        assert torch.equal(module.state_dict()[key], tensor), key


def test_every_order_of_initialization_gives_zero_biases():
    """FSDP initializes each module by itself, and parents before their children."""
    module = MaskedMultiheadAttention(E, H)
    for parameter in module.parameters():
        nn.init.constant_(parameter, math.nan)
    for part in module.modules():
        part.reset_parameters()
    assert not module.in_proj_bias.any() and not module.out_proj.bias.any()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_traced_module_takes_other_lengths_and_seeds(tmp_path):
    module = MaskedMultiheadAttention(E, H, batch_first=True, mask_ratio=0.3)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = module

        def forward(self, x, padding, seed):
            return self.attention(x, x, x, key_padding_mask=padding, mask_seed=seed)[0]

    def arguments(batch, length, seed):
        return (
            torch.randn(batch, length, E),
            torch.arange(length).expand(batch, length) > length - 2,
            torch.tensor(seed),
        )

    traced = torch.jit.trace(Wrapped(), arguments(2, 5, 3), check_trace=False)
    traced.save(tmp_path / "traced.pt")
    loaded, given = torch.jit.load(tmp_path / "traced.pt"), arguments(3, 9, 4)
    torch.testing.assert_close(loaded(*given), Wrapped()(*given))
    loaded(*given).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_module_trains_under_fsdp():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        module = MaskedMultiheadAttention(E, H, batch_first=True, mask_ratio=0.3, device="meta")
        fsdp.fully_shard(module, mesh=mesh)
        module.to_empty(device="cpu")
        for part in module.modules():
            part.reset_parameters()
        x = torch.randn(2, 5, E)
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            module.dual_branch(x, x, x, x)
        fsdp.register_fsdp_forward_method(module, "dual_branch")
        sum(out.square().sum() for out in module.dual_branch(x, x, x, x)).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        module(x, x, x)[0].sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_default_device_holds_the_parameters():
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in MaskedMultiheadAttention(E, H).parameters())
