"""The mirrored branch of any model: `RelationAlignment`, `Mirror` and `replace_attention`."""

import contextlib
import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sgalign
from sgalign.nn import MaskedMultiheadAttention, Mirror, RelationAlignment, replace_attention
from sgalign.ops.seeds import step_seed

E, H, B, Q, L = 24, 4, 3, 5, 60
RATIO = 0.3


@pytest.fixture(autouse=True)
def no_graphs():
    """Forget compiled graphs, because torch allows only eight for each function of its own decoder."""
    yield
    torch.compiler.reset()


class Decoder(nn.TransformerDecoder):
    """torch's decoder, which computes its layers again in the backward pass if `checkpointed`."""

    checkpointed: bool | None = None  # use_reentrant of torch's checkpoint. If None, there is no checkpointing

    def forward(self, queries, memory, **masks):
        for layer in self.layers:
            if self.checkpointed is None:
                queries = layer(queries, memory, **masks)
            else:
                queries = checkpoint(lambda x, y, layer=layer: layer(x, y, **masks), queries, memory,
                                     use_reentrant=self.checkpointed)  # fmt: skip
        return queries


def make_decoder(batch_first=True, dropout=0.0):
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=dropout, batch_first=batch_first)
    return Decoder(layer, 2).double()


def inputs(batch_first=True):
    queries, memory = torch.randn(B, Q, E).double(), torch.randn(B, L, E).double()
    if not batch_first:
        queries, memory = queries.transpose(0, 1), memory.transpose(0, 1)
    return queries.requires_grad_(), memory.requires_grad_()


def with_dense_masks(decoder, queries, memory, seed, streams=(0, 1), ratio=RATIO, **masks):
    """Run torch's own decoder with the masks that the mirror draws, as tensors."""
    given = masks.pop("memory_mask", None)
    for stream, layer in zip(streams, decoder.layers):
        mask = sgalign.random_attention_mask(B, H, Q, L, ratio=ratio, seed=seed, stream=stream).flatten(0, 1)
        queries = layer(queries, memory, memory_mask=mask if given is None else mask | given, **masks)
    return queries


def close(*pair, **limits):
    torch.testing.assert_close(*pair, **{"atol": 1e-10, "rtol": 1e-8} | limits)


def gradients(outputs, tensors):
    """Return the gradients of a sum in which both branches have weights of their own."""
    for tensor in tensors:
        tensor.grad = None
    sum((out * torch.linspace(1, 2 + i, out.numel()).view(out.shape)).sum() for i, out in enumerate(outputs)).backward()
    return [tensor.grad for tensor in tensors]


# ------------------------------------------------------------------------------------------ compared with two calls


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_both_branches_equal_two_calls_with_dense_masks(batch_first, checkpointed):
    theirs, (queries, memory) = make_decoder(batch_first), inputs(batch_first)
    ours = copy.deepcopy(theirs)
    replace_attention(ours, "multihead_attn")
    ours.checkpointed = checkpointed
    padding = torch.arange(L).expand(B, L) >= torch.tensor([[L], [L - 7], [L - 20]])
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(Q).double(), "memory_key_padding_mask": padding}
    masks["memory_mask"] = torch.zeros(Q, L).bool()
    masks["memory_mask"][1, 3:] = True
    with RelationAlignment(mask_ratio=RATIO, seed=3).mirror(ours, step=7, micro_batch=1, rank=2) as mirror:
        found = mirror.both(ours, queries, memory, dim=0 if batch_first else 1, **masks)
    dense = with_dense_masks(theirs, queries, memory, step_seed(3, 7, 1, 2), **masks)
    expected = theirs(queries, memory, **masks), dense
    close(found, expected)
    assert (found[0] - found[1]).abs().max() > 1e-3
    given = gradients(found, [queries, memory, *ours.parameters()])
    close(given, gradients(expected, [queries, memory, *theirs.parameters()]))


def test_decoder_of_torch_takes_causal_and_floating_point_masks():
    theirs, (queries, memory) = make_decoder(), inputs()
    theirs.__class__ = nn.TransformerDecoder
    ours = copy.deepcopy(theirs)
    replace_attention(ours)
    causal = nn.Transformer.generate_square_subsequent_mask(Q).double()
    given = torch.zeros(Q, L).double().masked_fill(torch.rand(Q, L) < 0.3, -torch.inf)
    masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_mask": given}
    for training in (True, False):
        with RelationAlignment(mask_ratio=RATIO).mirror(ours.train(training), step=0) as mirror:
            found = mirror.both(ours, queries, memory, **masks)
        # All four attention modules are replaced, so those of the memory have the streams 1 and 3.
        masked = {"tgt_mask": causal, "tgt_is_causal": True, "memory_mask": given == -torch.inf}
        dense = with_dense_masks(theirs, queries, memory, step_seed(0, 0, 0, 0), streams=(1, 3), **masked)
        close(found, (theirs.train(training)(queries, memory, **masks), dense))


def test_two_forwards_can_share_a_checkpointed_backward():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    found = []
    for decoder.checkpointed in (None, False):
        total = []
        for step in (0, 1):
            with RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=step) as mirror:
                total += mirror.both(decoder, queries, memory)
        found.append(gradients(total, [queries, memory, *decoder.parameters()]))
    close(*found)
    assert not in_force(decoder)


def in_force(model):
    """Return the names of the attributes that mirrors have left on a model."""
    return [name for part in model.modules() for name in vars(part) if name.startswith("_sgalign")]


def test_checkpointed_outputs_that_were_not_split_are_refused():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    decoder.checkpointed = False
    with RelationAlignment().mirror(decoder, step=0) as mirror:
        out = decoder(mirror.double(queries), memory)
    with pytest.raises(ValueError, match="With activation checkpointing, split"):
        out.sum().backward()
    with RelationAlignment().mirror(decoder, step=0) as mirror:
        decoder(mirror.double(queries), memory).sum().backward()


@pytest.mark.parametrize("checkpointed", [None, False, True])
def test_backward_can_run_inside_the_block_of_the_next_mirror(checkpointed):
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder)
    align = RelationAlignment(mask_ratio=RATIO, masked=["self_attn", "multihead_attn"])
    with align.mirror(decoder, step=1) as second:
        expected = second.both(decoder, queries, memory)
    found = []
    for decoder.checkpointed in (None, checkpointed):
        with align.mirror(decoder, step=0) as first:
            losses = first.both(decoder, queries, memory)
        with align.mirror(decoder, step=1) as second:
            given = gradients(losses, [queries, memory, *decoder.parameters()])
            found.append([*given, *second.both(decoder, queries, memory)])
        assert not in_force(decoder)
    close(*found)
    close(found[0][-2:], list(expected))


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 compiles checkpointed layers again up to its limit")
@pytest.mark.parametrize("masked", [pytest.param(None, marks=pytest.mark.slow), ["self_attn", "multihead_attn"]])
def test_checkpointed_layers_can_be_compiled(masked):
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder)
    found = []
    for compiled in (False, True):
        if compiled:
            for layer in decoder.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        decoder.checkpointed = False if compiled else None
        for step in (0, 1):
            with RelationAlignment(mask_ratio=RATIO, masked=masked).mirror(decoder, step=step) as mirror:
                outputs = mirror.both(decoder, queries, memory)
        found.append(gradients(outputs, [queries, memory, *decoder.parameters()]))
    close(*found)


def test_failed_backward_leaves_nothing_behind():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    expected = decoder(queries, memory)
    with RelationAlignment(mask_ratio=1.0).mirror(decoder, step=0) as mirror:
        hidden, mirrored = mirror.both(decoder, queries, memory)

    def fail(grad):
        raise KeyboardInterrupt

    queries.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        (hidden + mirrored).sum().backward()
    assert not in_force(decoder)
    close(decoder(queries.detach(), memory), expected)
    with pytest.raises(ValueError, match="query must have the batch size of key"):
        decoder(torch.cat([queries, queries]).detach(), memory)
    with RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=0) as mirror:
        mirror.both(decoder, queries, memory)


def test_branches_with_own_keys_or_masks_equal_two_calls():
    """In Mask2Former each branch has explicit masks of its own."""
    attention = MaskedMultiheadAttention(E, H, batch_first=True).double()
    queries, memory = torch.randn(2 * B, Q, E).double(), torch.randn(2 * B, L, E).double()
    masks = torch.rand(2 * B * H, Q, L) < 0.5
    padding = torch.rand(2 * B, L) < 0.2
    for keys, masked in ((memory[:B], None), (memory, "attention")):
        paddings = padding[: len(keys)]
        model = nn.ModuleDict({"attention": attention})
        with RelationAlignment(mask_ratio=RATIO, masked=masked).mirror(model, step=1) as mirror:
            mirror.double(queries[:B])
            out, _ = attention(queries, keys, keys, attn_mask=masks, key_padding_mask=paddings)
        clean, _ = attention(queries[:B], keys[:B], keys[:B], attn_mask=masks[: B * H], key_padding_mask=paddings[:B])
        close(out[:B], clean)
        attention.mask_ratio = RATIO
        second, _ = attention(
            queries[B:],
            keys[-B:],
            keys[-B:],
            attn_mask=masks[B * H :],
            key_padding_mask=paddings[-B:],
            mask_seed=step_seed(0, 1, 0, 0),
        )
        attention.mask_ratio = 0.0
        close(out[B:], second)


@pytest.mark.parametrize("given", [(Q, L), (B * H, Q, L)])
def test_masks_of_one_branch_hold_for_both(given):
    attention = MaskedMultiheadAttention(E, H, batch_first=True).double()
    queries, memory, mask = torch.randn(B, Q, E).double(), torch.randn(B, L, E).double(), torch.rand(given) < 0.5
    with RelationAlignment(mask_ratio=0.0).mirror(attention, step=0) as mirror:
        halves = mirror.both(lambda x: attention(x, memory, memory, attn_mask=mask)[0], queries)
    for half in halves:
        close(half, attention(queries, memory, memory, attn_mask=mask)[0])


def test_as_many_queries_as_images_are_no_batch_of_masks():
    """A mask of [Lq, Lk] whose Lq is the doubled batch size belongs to both branches."""
    attention = MaskedMultiheadAttention(E, H, batch_first=True).double()
    queries, memory, mask = torch.randn(B, 2 * B, E).double(), torch.randn(B, L, E).double(), torch.rand(2 * B, L) < 0.5
    with RelationAlignment(mask_ratio=0.0).mirror(attention, step=0) as mirror:
        halves = mirror.both(lambda x: attention(x, memory, memory, attn_mask=mask)[0], queries)
    for half in halves:
        close(half, attention(queries, memory, memory, attn_mask=mask)[0])


# ------------------------------------------------------------------------------------------ the model as it was


def test_without_masks_both_branches_are_the_model():
    theirs, (queries, memory) = make_decoder(), inputs()
    head = nn.Linear(E, 4).double()
    ours, align = copy.deepcopy(theirs), RelationAlignment(mask_ratio=0.0, heads={"predicate": head})
    replace_attention(ours, "multihead_attn")
    with align.mirror(ours, step=0) as mirror:
        hidden, mirrored = mirror.both(ours, queries, memory)
    close(hidden, theirs(queries, memory))
    close(mirrored, hidden)
    loss = mirror.loss(predicate=(head(hidden), align.heads["predicate"](mirrored)))
    close(loss, torch.zeros_like(loss), atol=1e-12)


def test_dropout_of_the_attention_is_the_same_in_both_branches():
    attention = MaskedMultiheadAttention(E, H, dropout=0.5, batch_first=True).double()
    queries, memory = torch.randn(B, Q, E).double(), torch.randn(B, L, E).double()
    with RelationAlignment(mask_ratio=0.0).mirror(attention, step=0) as mirror:
        hidden, mirrored = mirror.both(lambda x: attention(x, memory, memory)[0], queries)
    close(hidden, mirrored)
    assert (hidden - attention.eval()(queries, memory, memory)[0]).abs().max() > 1e-3


def test_mirror_leaves_nothing_behind():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    before, state = decoder(queries, memory), list(decoder.state_dict())
    align = RelationAlignment(mask_ratio=RATIO, heads={"predicate": nn.Linear(E, 4)})
    with align.mirror(decoder, step=0) as mirror:
        hidden, mirrored = mirror.both(decoder, queries, memory)
    (hidden + mirrored).sum().backward()
    assert torch.equal(decoder(queries, memory), before) and list(decoder.state_dict()) == state
    assert list(align.state_dict()) == ["heads.predicate.weight", "heads.predicate.bias"]
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(queries, memory), before)
        assert not in_force(other)
    with pytest.raises(ZeroDivisionError), align.mirror(decoder, step=0):
        raise ZeroDivisionError
    assert torch.equal(decoder(queries, memory), before)


def test_model_outside_the_mirror_compiles_exports_and_copies():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    expected = decoder(queries, memory)
    with RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=0) as mirror:
        mirror.both(decoder, queries, memory)
        copies = copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))
    for other in copies:
        close(other(queries, memory), expected)
        with pytest.raises(ValueError, match="query must have the batch size of key"):
            other(torch.cat([queries, queries]), memory)
        with RelationAlignment(mask_ratio=RATIO).mirror(other, step=0) as mirror:
            mirror.both(other, queries, memory)
    close(torch.compile(decoder, backend="aot_eager", fullgraph=True)(queries, memory), expected)
    saved = io.BytesIO()
    torch.export.save(torch.export.export(decoder, (queries, memory)), saved)
    close(torch.export.load(io.BytesIO(saved.getvalue())).module()(queries, memory), expected)


def test_compiled_decoder_needs_no_new_graph_for_a_new_step():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decoder, backend=counter, fullgraph=True)
    align = RelationAlignment(mask_ratio=RATIO)
    for step in range(3):
        found = []
        for model in (decoder, compiled):
            with align.mirror(decoder, step=step) as mirror:
                found.append(mirror.both(model, queries, memory))
        close(*found)
        close(compiled(queries, memory), decoder(queries, memory))
    assert counter.frame_count == 2, "one graph inside the mirror and one outside"


# ------------------------------------------------------------------------------------------ the masks


def masks_of(attention, queries, memory, **seeds):
    """Return the mirrored output, which shows the mask."""
    with RelationAlignment(mask_ratio=RATIO, seed=seeds.pop("seed", 0)).mirror(attention, **seeds) as mirror:
        return mirror.both(lambda x: attention(x, memory, memory)[0], queries)[1]


def test_masks_repeat_and_differ_with_step_micro_batch_rank_and_seed():
    attention = MaskedMultiheadAttention(E, H, batch_first=True)
    queries, memory = torch.randn(B, Q, E), torch.randn(B, L, E)
    first = masks_of(attention, queries, memory, step=0)
    assert torch.equal(first, masks_of(attention, queries, memory, step=0))
    for seeds in ({"step": 1}, {"step": 0, "micro_batch": 1}, {"step": 0, "rank": 1}, {"step": 0, "seed": 1}):
        assert not torch.allclose(first, masks_of(attention, queries, memory, **seeds)), seeds


def test_masked_chooses_attention_by_name_and_class():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder)
    names = [name for name, part in decoder.named_modules() if isinstance(part, MaskedMultiheadAttention)]

    def mirrored(**options):
        with RelationAlignment(mask_ratio=RATIO, **options).mirror(decoder, step=0) as mirror:
            hidden, mirrored = mirror.both(decoder, queries, memory)
        close(hidden, decoder(queries, memory))
        return mirrored

    shared_keys = mirrored()
    close(shared_keys, mirrored(masked="multihead_attn"))
    close(shared_keys, mirrored(masked=["layers.0.multihead_attn", "layers.1.multihead_attn"]))
    close(mirrored(masked=MaskedMultiheadAttention), mirrored(masked=names))
    different = [shared_keys, mirrored(masked="self_attn"), mirrored(masked=names), mirrored(masked=names[1:2])]
    for i, one in enumerate(different):
        assert all((one - other).abs().max() > 1e-3 for other in different[:i])


def test_masked_self_attention_equals_a_dense_mask():
    attention = MaskedMultiheadAttention(E, H, batch_first=True).double()
    queries = torch.randn(B, Q, E).double()
    with RelationAlignment(mask_ratio=RATIO, masked=nn.Module).mirror(attention, step=0) as mirror:
        _, mirrored = mirror.both(lambda x: attention(x, x, x)[0], queries)
    mask = sgalign.random_attention_mask(B, H, Q, Q, ratio=RATIO, seed=step_seed(0, 0, 0, 0)).flatten(0, 1)
    close(mirrored, attention(queries, queries, queries, attn_mask=mask)[0])


def test_mirror_works_in_evaluation_and_without_gradients():
    decoder, (queries, memory) = make_decoder(dropout=0.3).eval(), inputs()
    theirs = copy.deepcopy(decoder)
    replace_attention(decoder, "multihead_attn")
    with torch.no_grad(), RelationAlignment(mask_ratio=RATIO).mirror(decoder, step=0) as mirror:
        found = mirror.both(decoder, queries, memory)
    close(found[1], with_dense_masks(theirs, queries, memory, step_seed(0, 0, 0, 0)))


def test_empty_batch_has_both_branches():
    decoder, align = make_decoder(), RelationAlignment(mask_ratio=0.0)
    replace_attention(decoder)
    queries, memory = torch.zeros(0, Q, E).double(), torch.zeros(0, L, E).double()
    with pytest.raises(ValueError, match="must apply the random mask"), align.mirror(decoder, step=0):
        pass
    with align.mirror(decoder, step=0) as mirror:
        hidden, mirrored = mirror.both(decoder, queries, memory)
    assert hidden.shape == mirrored.shape == (0, Q, E)


def test_mirror_works_under_autocast():
    decoder, (queries, memory) = make_decoder().float(), inputs()
    replace_attention(decoder, "multihead_attn")
    with torch.autocast("cpu", torch.bfloat16), RelationAlignment(mask_ratio=0.0).mirror(decoder, step=0) as mirror:
        hidden, mirrored = mirror.both(decoder, queries.float(), memory.float())
        loss = mirror.loss(predicate=(hidden, mirrored))
    assert loss.isfinite() and not torch.equal(hidden, decoder(queries.float(), memory.float()))
    torch.testing.assert_close(hidden, mirrored)


# ------------------------------------------------------------------------------------------ rows of features


def test_rows_are_masked_with_the_given_probability():
    rows = torch.randn(4, 1000, 8)
    with RelationAlignment(mask_ratio=RATIO).mirror(step=2) as mirror:
        masked, again, other = mirror.mask_rows(rows), mirror.mask_rows(rows), mirror.mask_rows(rows, stream=1)
    dropped = (masked == 0).all(-1)
    assert torch.equal(masked[~dropped], rows[~dropped]) and abs(dropped.float().mean() - RATIO) < 0.03
    assert torch.equal(masked, again) and not torch.equal(masked, other)
    assert len({tuple(image.tolist()) for image in dropped}) == 4
    table = RelationAlignment(mask_ratio=RATIO).mirror(step=2).mask_rows(rows[0])
    assert torch.equal(table, masked[0]), "a table without a batch has the mask of the first image"


def test_rows_of_a_recurrent_model_are_masked_in_one_pass():
    torch.manual_seed(0)
    lstm, rows = nn.LSTM(E, 8, batch_first=True).double(), torch.randn(B, Q, E).double()
    with RelationAlignment(mask_ratio=0.5).mirror(step=0) as mirror:
        masked = mirror.mask_rows(rows)
        hidden, mirrored = mirror.split(lstm(mirror.double(rows, masked))[0])
    close((hidden, mirrored), (lstm(rows)[0], lstm(masked)[0]))


# ------------------------------------------------------------------------------------------ heads and losses


def test_loss_is_the_weighted_sum():
    pairs = {name: tuple(torch.randn(2, B, Q, 4)) for name in ("predicate", "subject")}
    kinds = {"predicate": "sigmoid", "subject": "softmax"}
    align = RelationAlignment(weight=3.0, kind=kinds, reduction="relation", direction="symmetric", warmup_steps=4)
    expected = {
        name: sgalign.relation_alignment_loss(
            *(x.flatten(0, 1) for x in pair), kind=kinds[name], reduction="relation", direction="symmetric"
        )
        for name, pair in pairs.items()
    }
    close(align.mirror(step=0).losses(**pairs), expected)
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        close(align.mirror(step=step).loss(**pairs), 3 * share * sum(expected.values()), atol=1e-6, rtol=1e-6)
    close(RelationAlignment().mirror(step=0).weight, 10.0)


def test_heads_are_copies_that_train_on_their_own():
    head = nn.Linear(E, 4)
    align = RelationAlignment(heads={"predicate": head})
    assert torch.equal(align.heads["predicate"].weight, head.weight) and align.heads["predicate"] is not head
    hidden = torch.randn(B, Q, E)
    align.mirror(step=0).loss(predicate=(head(hidden), align.heads["predicate"](2 * hidden))).backward()
    assert head.weight.grad is None and align.heads["predicate"].weight.grad.abs().sum() > 0


def test_alignment_trains_a_decoder():
    torch.manual_seed(0)
    decoder, head = make_decoder().float(), nn.Linear(E, 4)
    replace_attention(decoder, "multihead_attn")
    align = RelationAlignment(mask_ratio=RATIO, heads={"predicate": head})
    parameters = [*decoder.parameters(), *head.parameters(), *align.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    queries, memory, targets = torch.randn(B, Q, E), torch.randn(B, L, E), torch.randint(4, (B, Q))
    losses = []
    for step in range(40):
        with align.mirror(decoder, step=step) as mirror:
            hidden, mirrored = mirror.both(decoder, queries, memory)
        logits = head(hidden)
        alignment = mirror.loss(predicate=(logits, align.heads["predicate"](mirrored)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()) + alignment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss - alignment).item())
    assert losses[-1] < losses[0] / 4 and all(parameter.grad is not None for parameter in parameters)


# ------------------------------------------------------------------------------------------ replacing


def test_replaced_attention_keeps_everything():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, dropout=0.1, dtype=torch.float64), 2).eval()
    model.layers[1].multihead_attn.in_proj_bias.requires_grad_(False)
    parameters, names, state = list(model.parameters()), list(dict(model.named_parameters())), model.state_dict()
    frozen = [parameter.requires_grad for parameter in parameters]
    queries, memory = torch.randn(Q, B, E).double(), torch.randn(L, B, E).double()
    expected, calls = model(queries, memory), []
    attention = model.layers[0].multihead_attn
    hooks = [attention.register_forward_hook(lambda *_: calls.append(1))]
    hooks += [attention.out_proj.register_forward_pre_hook(lambda *_: calls.append(2))]
    assert replace_attention(model, "multihead_attn") == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert model.layers[0].multihead_attn is attention and isinstance(attention, MaskedMultiheadAttention)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    assert names == list(dict(model.named_parameters())) and list(state) == list(model.state_dict())
    assert frozen == [parameter.requires_grad for parameter in model.parameters()]
    assert not attention.training and attention.dropout == 0.1 and attention.mask_ratio == 0
    close(model(queries, memory), expected)
    assert calls == [2, 1]
    for hook in hooks:
        hook.remove()
    assert replace_attention(model, "multihead_attn") == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied.load_state_dict(state)
    close(copied(queries, memory), expected)
    assert "mask_ratio=0.0" in repr(attention)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 6}, {"bias": False}])
def test_replaced_attention_computes_the_same(sizes):
    attention = nn.MultiheadAttention(E, H, batch_first=True, **sizes).double()
    ours = copy.deepcopy(attention)
    assert replace_attention(ours) == [""]
    query, key = torch.randn(B, Q, E).double(), torch.randn(B, L, sizes.get("kdim", E)).double()
    value = torch.randn(B, L, sizes.get("vdim", E)).double()
    close(ours(query, key, value)[0], attention(query, key, value, need_weights=False)[0])


def test_encoder_with_replaced_attention_takes_padded_input():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).double().eval()
    x, padding = torch.randn(B, Q, E).double(), torch.arange(Q).expand(B, Q) > 3
    expected = encoder(x, src_key_padding_mask=padding)
    replace_attention(encoder)
    with torch.no_grad():
        close(encoder(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_replaced_attention_on_the_meta_device_can_be_initialized():
    with torch.device("meta"):
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 1)
    replace_attention(decoder, "multihead_attn")
    decoder.to_empty(device="cpu")
    for part in decoder.modules():
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(part, name):
                getattr(part, name)()
                break
        if isinstance(part, nn.MultiheadAttention):
            part.out_proj.bias.data.zero_()  # torch leaves it as `Linear` initializes it
    for part in decoder.modules():
        if isinstance(part, MaskedMultiheadAttention):
            assert not part.out_proj.bias.any() and part.in_proj_weight.abs().max() > 0
    assert decoder(torch.randn(B, Q, E), torch.randn(B, L, E)).isfinite().all()


class Other(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "make, names, message",
    [
        (lambda: nn.Linear(2, 2), (), "must contain a torch.nn.MultiheadAttention, got none"),
        (lambda: make_decoder(), ("cross",), r"names must be among .*layers.0.self_attn.* got 'cross'"),
        (lambda: nn.MultiheadAttention(E, H, add_bias_kv=True), (), "'' cannot be replaced: add_bias_kv"),
        (lambda: nn.Sequential(nn.MultiheadAttention(E, H, add_zero_attn=True)), (), "'0' cannot be .*add_zero_attn"),
        (lambda: Other(E, H), (), "its class Other may compute something else"),
        (lambda: nn.MultiheadAttention(514, 2), (), "at most 256 channels per head, got 257"),
    ],
)
def test_attention_that_cannot_be_replaced_is_refused(make, names, message):
    with pytest.raises(ValueError, match=message):
        replace_attention(make(), *names)


def test_nothing_is_replaced_if_one_module_is_refused():
    model = nn.ModuleList([nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, add_zero_attn=True)])
    with pytest.raises(ValueError, match="'1' cannot be replaced"):
        replace_attention(model)
    assert type(model[0]) is nn.MultiheadAttention


# ------------------------------------------------------------------------------------------ distributed


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Trained(nn.Module):
    """A model with its mirror inside, as DDP needs it."""

    def __init__(self):
        super().__init__()
        self.decoder, self.head = make_decoder(), nn.Linear(E, 4).double()
        replace_attention(self.decoder, "multihead_attn")
        self.align = RelationAlignment(mask_ratio=RATIO, heads={"predicate": self.head})

    def forward(self, queries, memory, step):
        with self.align.mirror(self.decoder, step=step) as mirror:
            hidden, mirrored = mirror.both(self.decoder, queries, memory)
        logits = self.head(hidden)
        return logits.square().mean() + mirror.loss(predicate=(logits, self.align.heads["predicate"](mirrored)))


@pytest.mark.parametrize("checkpointed", [None, False])
def test_model_with_mirror_trains_under_ddp(one_process, checkpointed):
    model, (queries, memory) = Trained(), inputs()
    expected = torch.autograd.grad(model(queries, memory, 5), list(model.parameters()))
    model.decoder.checkpointed = checkpointed
    nn.parallel.DistributedDataParallel(model)(queries, memory, 5).backward()
    close([parameter.grad for parameter in model.parameters()], list(expected))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_model_with_mirror_trains_under_fsdp(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, (queries, memory) = Trained(), inputs()
    expected = torch.autograd.grad(model(queries, memory, 5), list(model.parameters()))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.decoder.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    model(queries, memory, 5).backward()
    close([parameter.grad.full_tensor() for parameter in model.parameters()], list(expected))


# ------------------------------------------------------------------------------------------ other uses


def test_weights_of_relations_leave_out_padding():
    logits, mirrored, valid = torch.randn(B, Q, 4), torch.randn(B, Q, 4), torch.rand(B, Q) < 0.5
    mirror = RelationAlignment().mirror(step=0)
    close(mirror.losses(p=(logits, mirrored, valid)), mirror.losses(p=(logits[valid], mirrored[valid])), atol=1e-6)
    close(mirror.loss(p=(logits, mirrored, torch.zeros(B, Q))), torch.zeros(()))


def test_attention_weights_in_a_mirror_are_those_of_both_branches():
    attention = MaskedMultiheadAttention(E, H, batch_first=True).double()
    queries, memory = torch.randn(B, Q, E).double(), torch.randn(B, L, E).double()
    masks = torch.rand(2 * B * H, Q, L) < 0.3
    for mask in (None, masks):
        with RelationAlignment(mask_ratio=RATIO).mirror(attention, step=0) as mirror:
            doubled = mirror.double(queries)
            out, _ = attention(doubled, memory, memory, attn_mask=mask)
            weights = attention.attention_weights(doubled, memory, attn_mask=mask, average_attn_weights=False)
        assert weights.shape == (2 * B, H, Q, L) and (weights[B:] == 0).sum() > (weights[:B] == 0).sum()
        values = attention._project(query=queries, key=memory, value=memory)[1][2]
        close(attention.out_proj(attention._merge_heads(weights @ torch.cat([values, values]), True)), out)


def test_output_dim_of_stacked_layers():
    decoder, (queries, memory) = make_decoder(batch_first=False), inputs(batch_first=False)
    replace_attention(decoder, "multihead_attn")
    with RelationAlignment().mirror(decoder, step=0) as mirror:
        stacked = mirror.both(lambda *x: torch.stack([decoder(*x)] * 4), queries, memory, dim=1, output_dim=2)
    assert [half.shape for half in stacked] == [(4, Q, B, E)] * 2


def test_outputs_may_be_nested():
    with RelationAlignment().mirror(step=0) as mirror:
        both = mirror.double(torch.arange(B))
        first, second = mirror.split({"a": (both, None), "b": [both + 1, 3, "text"]})
    assert first["a"][1] is None and first["b"][1:] == second["b"][1:] == [3, "text"]
    assert torch.equal(second["b"][0], torch.arange(B) + 1)


def test_rank_is_that_of_the_process_group(one_process, monkeypatch):
    align = RelationAlignment()
    assert align.mirror(step=0).seed == align.mirror(step=0, rank=0).seed
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert align.mirror(step=0).seed == align.mirror(step=0, rank=3).seed != align.mirror(step=0, rank=0).seed


def test_numbers_may_be_of_any_integer_type():
    align = RelationAlignment(seed=np.int64(3), warmup_steps=np.int32(2))
    given = align.mirror(step=np.int64(1), micro_batch=np.uint8(1), rank=np.int32(0))
    assert given.seed == RelationAlignment(seed=3).mirror(step=1, micro_batch=1).seed and given.weight == 5.0


def test_heads_that_share_parameters_share_them_in_the_mirror():
    head = nn.Linear(E, 4)
    heads = RelationAlignment(heads={"subject": head, "object": head}).heads
    assert heads["subject"] is heads["object"] is not head


def test_alignment_survives_the_initialization_of_a_model():
    model = nn.Sequential(RelationAlignment(heads={"predicate": nn.Linear(E, 4)}))
    model.apply(lambda part: nn.init.ones_(part.weight) if hasattr(part, "weight") else None)
    assert "kind='softmax'" in repr(model)


class Skipping(Decoder):
    skipped = False

    def forward(self, queries, memory):
        return queries if self.skipped else super().forward(queries, memory)


def test_layers_may_be_left_out_at_random():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder, "multihead_attn")
    decoder.__class__ = Skipping
    align = RelationAlignment()
    decoder.skipped = True
    with pytest.raises(ValueError, match="must apply the random mask"), align.mirror(decoder, step=0) as mirror:
        mirror.both(decoder, queries, memory)
    for decoder.skipped in (False, True):
        with align.mirror(decoder, step=0) as mirror:
            mirror.both(decoder, queries, memory)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"mask_ratio": 1.5}, ValueError, "mask_ratio must be in"),
        ({"weight": -1}, ValueError, "weight must be finite and at least 0, got -1"),
        ({"weight": float("nan")}, ValueError, "weight must be .* got nan"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0, got -1"),
        ({"warmup_steps": 1.0}, TypeError, "warmup_steps must be an int"),
        ({"seed": None}, TypeError, "seed must be an int"),
        ({"kind": "l1"}, ValueError, "kind must be one of .* got 'l1'"),
        ({"kind": {"predicate": "l1"}}, ValueError, "kind must be one of .* got 'l1'"),
        ({"reduction": "mean"}, ValueError, "reduction must be one of"),
        ({"direction": "both"}, ValueError, "direction must be one of"),
        ({"masked": [3]}, TypeError, "masked must hold names and classes, got int"),
        ({"masked": 3}, TypeError, "masked must hold names and classes, got int"),
        ({"masked": []}, ValueError, "masked must choose at least one"),
        ({"weight": "1"}, TypeError, "weight must be a number, got str"),
        ({"kind": {}, "reduction": "mean"}, ValueError, "reduction must be one of"),
        ({"heads": nn.Linear(1, 1)}, TypeError, "heads must be a dict of modules, got Linear"),
        ({"heads": {"a": None}}, TypeError, r"heads\['a'\] must be a torch.nn.Module, got NoneType"),
        ({"heads": {"a.b": nn.Linear(1, 1)}}, ValueError, "heads must have names .* got 'a.b'"),
        ({"heads": {"keys": nn.Linear(1, 1)}}, ValueError, "heads must have names .* got 'keys'"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        RelationAlignment(**options)


class DeformableAttention(nn.Module):
    pass


@pytest.mark.parametrize(
    "options, modules, error, message",
    [
        ({}, ["decoder"], TypeError, "modules must be torch.nn.Module, got str"),
        (
            {},
            [nn.Linear(2, 2)],
            ValueError,
            "must contain MaskedMultiheadAttention, .*got neither: .*set_attn_implementation",
        ),
        ({}, [make_decoder()], ValueError, "call sgalign.nn.replace_attention for .'layers.0.self_attn', "),
        ({}, [nn.ModuleList([MaskedMultiheadAttention(E, H), DeformableAttention()])], ValueError, "'1' .*sampled"),
        ({"masked": "x"}, [MaskedMultiheadAttention(E, H)], ValueError, r"masked must be among .*\[''\], got 'x'"),
    ],
)
def test_modules_that_cannot_be_mirrored_are_refused(options, modules, error, message):
    with pytest.raises(error, match=message):
        RelationAlignment(**options).mirror(*modules, step=0)


@pytest.mark.parametrize(
    "logits, error, message",
    [
        (torch.zeros(2, 3, 4), TypeError, "logits of 'p' must be a tuple of two tensors, .* got Tensor"),
        ((torch.zeros(3, 4), None), TypeError, "logits of 'p' must be a tensor, got NoneType"),
        ((torch.zeros(3, 5, 7), torch.zeros(5, 3, 7)), ValueError, r"got \[3, 5, 7\] and \[5, 3, 7\]"),
        ((torch.zeros(4), torch.zeros(4)), ValueError, r"must be \[..., K\] in both branches, got \[4\]"),
        (
            (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4)),
            ValueError,
            r"weights of 'p' must be \[3\], got \[4\]",
        ),
        ((torch.zeros(3, 1), torch.zeros(3, 1)), ValueError, "kind of 'p' must be \"sigmoid\" for a single class"),
    ],
)
def test_bad_logits_are_refused_by_name(logits, error, message):
    with pytest.raises(error, match=message):
        RelationAlignment().mirror(step=0).loss(p=logits)


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor


def test_chosen_modules_must_be_masked():
    decoder, (queries, memory) = make_decoder(), inputs()
    replace_attention(decoder)
    for masked, given in ((None, 2), ("multihead_attn", 1)):
        align = RelationAlignment(masked=masked)
        mirror = align.mirror(decoder, step=0)
        with pytest.raises(ValueError, match="multihead_attn.*do not double the keys and values"), mirror:
            mirror.double(queries)
            decoder(torch.cat([queries] * given), torch.cat([memory] * given))
        with mirror:
            mirror.both(decoder, queries, memory)
        with pytest.raises(ValueError, match="multihead_attn.*do not double the keys and values"), mirror:
            decoder(queries, memory)
    other = copy.deepcopy(decoder)
    for masked in (None, "multihead_attn"):
        mirror = RelationAlignment(masked=masked).mirror(decoder, other, step=0)
        with contextlib.nullcontext() if masked is None else pytest.raises(ValueError, match="multihead_attn"), mirror:
            mirror.both(decoder, queries, other(memory, memory))


def test_outputs_that_cannot_be_split_are_refused():
    mirror = RelationAlignment().mirror(step=0)
    both = mirror.double(torch.zeros(B, Q))
    with pytest.raises(TypeError, match="outputs must be a tensor, got Output"):
        mirror.split(Output(both))
    with pytest.raises(TypeError, match=r"outputs\['a'\] must be a tensor, got ndarray"):
        mirror.split({"a": both.numpy()})
    with pytest.raises(TypeError, match="outputs must contain a tensor, got tuple without one"):
        mirror.split((None, 3))
    with pytest.raises(
        ValueError, match=r"outputs\['memory'\] must have the size 6 in dimension dim=0, .*only outputs of"
    ):
        mirror.split({"hidden": both, "memory": torch.zeros(B, L)})


def test_wrong_use_of_a_mirror_is_refused():
    attention, align = MaskedMultiheadAttention(E, H, batch_first=True), RelationAlignment()
    queries, memory = torch.randn(B, Q, E), torch.randn(B, L, E)
    with pytest.raises(TypeError, match="step must be an int, got Tensor"):
        align.mirror(attention, step=torch.tensor(3))
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        align.mirror(attention, step=-1)
    with pytest.raises(ValueError, match="must be called inside the `with` block"):
        align.mirror(attention, step=0).double(queries)
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got str"):
        replace_attention("decoder")
    with pytest.raises(ValueError, match=r"query must have the batch size of key, 3, got 6.*inside the mirror"):
        attention(torch.cat([queries, queries]), memory, memory)
    with pytest.raises(ValueError, match="block of another mirror, got ''"), align.mirror(attention, step=0) as mirror:
        mirror.both(lambda x: attention(x, memory, memory)[0], queries)
        with align.mirror(attention, step=0):
            pass
    with (
        pytest.raises(ValueError, match=r"the attention modules \[''\] must apply the random mask"),
        align.mirror(attention, step=0),
    ):
        attention(queries, memory, memory)
    with align.mirror(attention, step=0) as mirror:
        for bad in (mirror.split, lambda out: mirror.both(lambda x: out, queries)):
            with pytest.raises(
                ValueError,
                match="split only after|outputs must have the size 6 in dimension dim=0, twice the batch size, got",
            ):
                bad(queries)
        with pytest.raises(
            ValueError, match=r"the size 3 of the first doubled tensor in dimension dim=1, got \[3, 5, 24"
        ):
            mirror.double(queries, dim=1)
        with pytest.raises(ValueError, match=r"dim must be a dimension of batch \[3\], got 1"):
            mirror.double(torch.zeros(3), dim=1)
        with pytest.raises(TypeError, match="batch must be a tensor, got list"):
            mirror.double([1, 2])
        with pytest.raises(TypeError, match="mirrored must be a tensor, got float"):
            mirror.double(queries, 0.0)
        with pytest.raises(ValueError, match=r"mirrored must have the shape of batch \[3, 5, 24\], got \[3, 4, 24\]"):
            mirror.double(queries, queries[:, 1:])
        with pytest.raises(ValueError, match=r"rows must be \[..., N, F\], got \[3\]"):
            mirror.mask_rows(torch.zeros(3))
        with pytest.raises(ValueError, match="stream must be in"):
            mirror.mask_rows(queries, stream=-1)
        with pytest.raises(ValueError, match="at least one entry"):
            mirror.loss()
        attention.mask_ratio = 0.1
        with pytest.raises(ValueError, match="mask_ratio of an attention module must be 0 inside a mirror.* got 0.1"):
            mirror.both(lambda x: attention(x, memory, memory)[0], queries)
        attention.mask_ratio = 0.0
        mirror.both(lambda x: attention(x, memory, memory)[0], queries)
    assert isinstance(mirror, Mirror)
    with pytest.raises(ValueError, match="kind must have an entry for 'predicate', got entries for"):
        RelationAlignment(kind={}).mirror(step=0).losses(predicate=(queries, queries))


# ------------------------------------------------------------------------------------------ Lightning


def test_mirror_in_a_lightning_module_repeats_after_a_resume(tmp_path):
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seeds = Trained(), []

        def training_step(self, batch, batch_idx):
            where = {"step": self.global_step, "micro_batch": batch_idx, "rank": self.global_rank}
            with self.model.align.mirror(self.model.decoder, **where) as mirror:
                hidden, mirrored = mirror.both(self.model.decoder, *batch)
            self.seeds.append(mirror.seed)
            logits, align = self.model.head(hidden), self.model.align
            return logits.square().mean() + mirror.loss(predicate=(logits, align.heads["predicate"](mirrored)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(module, epochs, path=None):
        quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", accumulate_grad_batches=2, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, data, ckpt_path=path)
        return trainer

    torch.manual_seed(0)
    batches = [(torch.randn(B, Q, E).double(), torch.randn(B, L, E).double()) for _ in range(4)]
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    whole, first = Module(), Module()
    second = Module()
    for module in (first, second):
        module.load_state_dict(whole.state_dict())
    fit(whole, 2)
    fit(first, 1).save_checkpoint(tmp_path / "model.ckpt")
    fit(second, 2, tmp_path / "model.ckpt")
    assert whole.seeds == first.seeds + second.seeds and len(set(whole.seeds)) == 8
    close(second.state_dict(), whole.state_dict())
