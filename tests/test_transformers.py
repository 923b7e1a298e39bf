"""Decoders of the library transformers with our attention, and their mirrored branch."""

import copy

import pytest
import torch

import sgalign
from sgalign.nn import RelationAlignment, register_with_transformers, replace_attention
from sgalign.nn import transformers as ours
from sgalign.ops.seeds import step_seed

transformers = pytest.importorskip("transformers")
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrDecoder  # noqa: E402
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrDecoder  # noqa: E402
from transformers.models.detr.modeling_detr import DetrDecoder  # noqa: E402
from transformers.models.mask2former.modeling_mask2former import Mask2FormerMaskedAttentionDecoder  # noqa: E402

E, H, B, Q, L = 32, 4, 3, 6, 40
RATIO = 0.3
SIZES = {"d_model": E, "decoder_attention_heads": H, "decoder_layers": 2, "decoder_ffn_dim": 48}
SIZES |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


@pytest.fixture(autouse=True)
def registered():
    register_with_transformers()


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def with_dense_masks(monkeypatch, seed, streams):
    """Make transformers' eager attention apply the mirror's masks to cross-attention, from the streams in order."""
    streams = iter(streams)

    def attention(module, query, key, value, attention_mask, **options):
        if query.shape[2] != key.shape[2]:
            mask = sgalign.random_attention_mask(B, H, Q, L, ratio=RATIO, seed=seed, stream=next(streams))
            mask = mask.double().masked_fill(mask, torch.finfo(query.dtype).min)
            attention_mask = mask if attention_mask is None else attention_mask + mask
        return eager(module, query, key, value, attention_mask, **options)

    from transformers.models.conditional_detr import modeling_conditional_detr
    from transformers.models.detr import modeling_detr

    eager = modeling_detr.eager_attention_forward
    for modeling in (modeling_detr, modeling_conditional_detr):
        monkeypatch.setattr(modeling, "eager_attention_forward", attention)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["detr", "conditional_detr"])
def test_detr_decoders_equal_two_calls_with_dense_masks(kind, checkpointed, monkeypatch):
    config, decoder = {
        "detr": (transformers.DetrConfig, DetrDecoder),
        "conditional_detr": (transformers.ConditionalDetrConfig, ConditionalDetrDecoder),
    }[kind]
    theirs = decoder(config(**SIZES, attn_implementation="eager")).double()
    decoder = copy.deepcopy(theirs)
    decoder.set_attn_implementation("sgalign")
    padding = (torch.arange(L) < torch.tensor([[L], [L - 9], [L - 1]])).long()
    queries, position, memory = random(B, Q, E), random(B, Q, E), random(B, L, E)
    shared = {"encoder_hidden_states": memory, "encoder_attention_mask": padding}
    shared["spatial_position_embeddings"] = random(B, L, E)
    if checkpointed:
        new = hasattr(decoder, "activation_checkpointing_enable")  # the name since transformers 5.21 or later
        (decoder.activation_checkpointing_enable if new else decoder.gradient_checkpointing_enable)()
    decoder.train()
    with RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=3) as mirror:
        output = decoder(
            inputs_embeds=mirror.double(queries), object_queries_position_embeddings=mirror.double(position), **shared
        )
        streams = [
            branches.stream
            for module, branches in mirror._branches.items()
            if type(module).__name__.endswith("CrossAttention")
        ]
    assert len(set(streams)) == 2
    found = [half.last_hidden_state for half in mirror.split(output)]
    sum((out * torch.linspace(-1, 1 + i, out.numel()).view_as(out)).sum() for i, out in enumerate(found)).backward()
    arguments = {"inputs_embeds": queries, "object_queries_position_embeddings": position, **shared}
    expected = [theirs(**arguments).last_hidden_state]
    torch.testing.assert_close(decoder(**arguments).last_hidden_state, expected[0])
    with_dense_masks(monkeypatch, step_seed(0, 3, 0, 0), streams)
    expected.append(theirs(**arguments).last_hidden_state)
    torch.testing.assert_close(found, expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    sum((out * torch.linspace(-1, 1 + i, out.numel()).view_as(out)).sum() for i, out in enumerate(expected)).backward()
    torch.testing.assert_close([p.grad for p in decoder.parameters()], [p.grad for p in theirs.parameters()])


def test_mask2former_has_masks_of_its_own_in_each_branch():
    config = transformers.Mask2FormerConfig(
        hidden_dim=E, num_attention_heads=H, decoder_layers=3, dim_feedforward=48, mask_feature_size=E, dropout=0.0
    )
    theirs = Mask2FormerMaskedAttentionDecoder(config).double()
    decoder = copy.deepcopy(theirs)
    assert replace_attention(decoder, "cross_attn") == ["layers.0.cross_attn", "layers.1.cross_attn"]
    levels = [(4, 4), (6, 6), (8, 8)]
    shared = {name: [random(h * w, B, E) for h, w in levels] for name in ("encoder_hidden_states",)}
    shared["multi_stage_positional_embeddings"] = [random(h * w, B, E) for h, w in levels]
    shared |= {"feature_size_list": levels, "return_dict": True}
    queries, position, pixels = random(Q, B, E), random(Q, B, E), random(B, E, 16, 16)
    with RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=0) as mirror:
        output = decoder(
            inputs_embeds=mirror.double(queries, dim=1),
            query_position_embeddings=mirror.double(position, dim=1),
            pixel_embeddings=mirror.double(pixels),
            **shared,
        )
    hidden, mirrored = mirror.split(output.last_hidden_state)
    plain = {"inputs_embeds": queries, "query_position_embeddings": position, "pixel_embeddings": pixels, **shared}
    torch.testing.assert_close(hidden, theirs(**plain).last_hidden_state)
    for number, layer in enumerate(theirs.layers):
        layer.cross_attn.register_forward_pre_hook(add_mask(number, step_seed(0, 0, 0, 0)), with_kwargs=True)
    torch.testing.assert_close(mirrored, theirs(**plain).last_hidden_state)


def add_mask(stream, seed):
    """Return a hook that adds the random mask of a stream to the explicit mask of torch's attention."""

    def hook(module, arguments, named):
        mask = named["attn_mask"]
        drawn = sgalign.random_attention_mask(B, H, *mask.shape[1:], ratio=RATIO, seed=seed, stream=stream)
        return arguments, named | {"attn_mask": mask | drawn.flatten(0, 1)}

    return hook


def test_causal_mask_of_a_module_that_does_not_call_itself_causal():
    sizes = {"d_model": E, "decoder_layers": 2, "decoder_attention_heads": H, "decoder_ffn_dim": 48, "vocab_size": 50}
    config = transformers.BigBirdPegasusConfig(**sizes, pad_token_id=0, attn_implementation="eager")
    model = transformers.models.bigbird_pegasus.modeling_bigbird_pegasus.BigBirdPegasusDecoder(config).double().eval()
    tokens, memory = random(2, 5, E), random(2, 9, E)
    expected = model(inputs_embeds=tokens, encoder_hidden_states=memory, use_cache=False).last_hidden_state
    model.set_attn_implementation("sgalign")
    found = model(inputs_embeds=tokens, encoder_hidden_states=memory, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_deformable_attention_is_refused_with_the_reason():
    config = transformers.DeformableDetrConfig(
        d_model=E, decoder_attention_heads=H, decoder_layers=1, attn_implementation="sgalign"
    )
    with pytest.raises(ValueError, match="dense attention, got 'layers.0.encoder_attn'.*sampled points"):
        RelationAlignment().mirror(DeformableDetrDecoder(config), step=0)


@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_with_grouped_heads_equals_eager(padded):
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="eager",
    )
    model = transformers.LlamaModel(config).eval()
    tokens = torch.randint(50, (2, 7))
    padding = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]]) if padded else None
    expected = model(tokens, attention_mask=padding).last_hidden_state
    model.set_attn_implementation("sgalign")
    found = model(tokens, attention_mask=padding).last_hidden_state
    kept = torch.ones(2, 7).bool() if padding is None else padding.bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-4)


class Module(torch.nn.Module):
    is_causal = False


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float64).min])
def test_masks_of_floats_are_masks(lowest):
    query, key = random(B, H, Q, 8), random(B, H, L, 8)
    mask = torch.zeros(B, 1, Q, L, dtype=torch.float64).masked_fill(torch.rand(B, 1, Q, L) < 0.5, lowest)
    out, weights = ours._attention(Module(), query, key, key, mask, scaling=0.3)
    assert weights is None
    expected = sgalign.fused_masked_attention(query, key, key, mask=mask != 0, scale=0.3)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    for wrong in (-1e9, torch.nan, 1.0):
        mask[0, 0, 0, 0] = wrong
        with pytest.raises(ValueError, match=r"attention_mask must be bool \(True = kept\), or hold only 0"):
            ours._attention(Module(), query, key, key, mask)
    with pytest.raises(TypeError, match="attention_mask must be bool or floating point, got torch.int64"):
        ours._attention(Module(), query, key, key, mask.long())


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias", "output_attentions"])
def test_other_scores_are_refused_by_name(name):
    query = random(B, H, Q, 8)
    with pytest.raises(ValueError, match=f'must not be "sgalign" for Module, which uses {name}'):
        ours._attention(Module(), query, query, query, None, **{name: 1.0})
    ours._attention(Module(), query, query, query, None, **{name: None})
