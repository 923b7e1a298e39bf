"""Tests of the remedies for the long tail: weighted losses, repeated images and dropped labels."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("lightning")
import lightning.pytorch as pl  # noqa: E402
from trainers import SMALL_MOTIFS, trainer  # noqa: E402

from sgalign.data import SceneGraph, SeenBatch, collate  # noqa: E402
from sgalign.training import AlignMotifsModule, MotifsModule  # noqa: E402
from sgalign.training.datamodule import SceneGraphData  # noqa: E402
from sgalign.training.longtail import RelationLoss, RepeatSampler, drop_repeated, repeat_factors  # noqa: E402

COUNTS = torch.tensor([900.0, 64, 32, 4, 0])  # pairs with the background and with each of four predicates


def graph(*relations, objects=4):
    boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(objects, 1) + torch.arange(objects)[:, None]
    relations = torch.tensor(relations, dtype=torch.int64).reshape(-1, 3)
    return SceneGraph("a", 40, 40, boxes, torch.ones(objects, dtype=torch.int64), relations)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    classes = torch.tensor([0, 1, 3, 2, 0, 4])
    return torch.randn(6, 5, generator=generator), functional.one_hot(classes, 5).float(), classes


def test_the_loss_without_options_is_cross_entropy(pairs):
    logits, targets, classes = pairs
    loss, total = RelationLoss(COUNTS)(logits, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, classes))
    assert total == 6


@pytest.mark.parametrize(
    "options, weight",
    [
        ({"weights": "inverse_frequency", "power": 1.0}, lambda n: 1 / n),
        ({"weights": "inverse_frequency"}, lambda n: n**-0.5),
        ({"weights": "effective_number", "beta": 0.9}, lambda n: 0.1 / (1 - 0.9**n)),
    ],
)
def test_the_weighted_loss_is_weighted_cross_entropy(pairs, options, weight):
    logits, targets, classes = pairs
    module = RelationLoss(COUNTS, **options)
    expected = weight(COUNTS.double().clamp(min=1)).float()
    torch.testing.assert_close(module.weight / module.weight[0], expected / expected[0])
    torch.testing.assert_close(
        (module.weight * COUNTS.clamp(min=1)).sum() / COUNTS.clamp(min=1).sum(), torch.tensor(1.0)
    )
    loss, total = module(logits, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, classes, weight=expected))
    torch.testing.assert_close(total, module.weight[classes].sum())


def test_pairs_without_a_target_do_not_count(pairs):
    logits, targets, _ = pairs
    module = RelationLoss(COUNTS, weights="inverse_frequency")
    loss, total = module(logits, targets * torch.tensor([1.0, 1, 0, 1, 0, 1])[:, None])
    expected, expected_total = module(logits[[0, 1, 3, 5]], targets[[0, 1, 3, 5]])
    torch.testing.assert_close((loss, total), (expected, expected_total))
    assert module(logits, targets * 0)[0] == 0 and module(logits[:0], targets[:0])[0] == 0


def test_logit_adjustment_is_relative_to_uniform_predicates(pairs):
    logits, targets, classes = pairs
    prior = torch.tensor([64.0, 32, 4, 1])
    shift = torch.cat((torch.zeros(1), (prior / prior.mean()).log()))
    loss, _ = RelationLoss(COUNTS, adjustment=0.5)(logits, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(logits + 0.5 * shift, classes))
    torch.testing.assert_close(RelationLoss(COUNTS, adjustment_test=2.0).adjusted(logits), logits - 2 * shift)


def test_equally_frequent_predicates_need_no_logit_adjustment():
    uniform = RelationLoss(torch.tensor([900.0, 7, 7]), adjustment=1.0, adjustment_test=1.0)
    assert not uniform.log_prior.any()


def test_repeat_factors_are_square_roots_of_threshold_by_share():
    graphs = [graph((0, 1, 1), (1, 2, 1), (2, 3, 1)), graph((0, 1, 2))]
    torch.testing.assert_close(repeat_factors(graphs, 3, 1.0), torch.tensor([1, (4 / 3) ** 0.5, 2, 1]).double())
    assert (repeat_factors(graphs, 3, 0.0) == 1).all()
    assert repeat_factors(graphs, 3, 0.5).tolist() == pytest.approx([1, 1, 2**0.5, 1])


def drawn(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_image_is_repeated_by_the_factor_of_its_rarest_predicate():
    graphs = [graph((0, 1, 1)), graph((0, 1, 1), (1, 2, 2)), graph((0, 1, 3))]
    sampler = RepeatSampler(graphs, torch.tensor([1.0, 1, 2.5, 4], dtype=torch.float64), num_replicas=1, rank=0, seed=0)
    counts = torch.stack([torch.bincount(torch.tensor(drawn(sampler, epoch)), minlength=3) for epoch in range(400)])
    assert (counts.sum(1) == 8).all() and len(sampler) == 8  # 1 + 2.5 + 4 = 7.5, rounded
    expected = torch.tensor([1, 2.5, 4]) * 8 / 7.5
    assert ((counts >= expected.floor()) & (counts <= expected.ceil())).all()
    torch.testing.assert_close(counts.double().mean(0), expected.double(), atol=0.1, rtol=0)


def test_without_repeats_each_image_comes_once_in_an_order_that_depends_on_seed_and_epoch():
    graphs = [graph((0, 1, 1))] * 50
    ones = torch.ones(4, dtype=torch.float64)
    sampler, other = (RepeatSampler(graphs, ones, num_replicas=1, rank=0, seed=seed) for seed in (0, 7))
    orders = [drawn(sampler, 0), drawn(sampler, 1), drawn(other, 0)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and drawn(sampler, 0) == orders[0]


def test_two_processes_take_turns_in_the_order_of_one():
    graphs = [graph((0, 1, 1 + i % 3)) for i in range(40)]
    factors = torch.tensor([1, 1.5, 2.25, 1], dtype=torch.float64)
    whole = RepeatSampler(graphs, factors, num_replicas=1, rank=0, seed=3)
    halves = [RepeatSampler(graphs, factors, num_replicas=2, rank=rank, seed=3) for rank in (0, 1)]
    parts = [drawn(half, 5) for half in halves]
    assert [index for pair in zip(*parts) for index in pair][: len(whole)] == drawn(whole, 5)


def test_labels_are_dropped_as_often_as_a_rarer_label_repeats_their_image():
    """Relations with factors 1, 2 and 4 in one image are dropped with probabilities 3/4, 1/2 and 0 at rate 1."""
    batch = collate([graph((0, 1, 1), (1, 2, 2), (2, 3, 3), (3, 0, 1), (3, 0, 3)), graph((0, 1, 1))], 3)
    factors = torch.tensor([1.0, 1, 2, 4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    kept = torch.stack([drop_repeated(batch, factors, 1.0, generator).targets for _ in range(2000)]).sum(2).mean(0)
    rows = {tuple(pair): row for row, pair in enumerate(batch.pairs.tolist())}
    shares = [kept[rows[pair]].item() for pair in ((0, 1), (1, 2), (2, 3), (3, 0), (1, 0), (4, 5))]
    # The rarest predicate of a pair decides. Background and images that come once keep their labels.
    assert shares == pytest.approx([0.25, 0.5, 1, 1, 1, 1], abs=0.05)
    assert shares[2:] == [1] * 4
    dropped = drop_repeated(batch, factors, 1.0, generator)
    assert torch.equal(dropped.related, dropped.targets[:, 1:].any(1))
    # Rate 0 drops nothing.
    assert torch.equal(drop_repeated(batch, factors, 0.0, generator).targets, batch.targets)


def test_weights_and_adjustments_are_saved_in_checkpoints(tmp_path):
    data = SceneGraphData()
    data.train, data.validation = data.train[:32], data.validation[:8]
    module = AlignMotifsModule(**SMALL_MOTIFS, predicate_weights="inverse_frequency", logit_adjustment_test=0.5)
    fitting = trainer()
    fitting.fit(module, datamodule=data)
    fitting.save_checkpoint(tmp_path / "m.ckpt")
    loaded = AlignMotifsModule.load_from_checkpoint(tmp_path / "m.ckpt")
    assert loaded.relation_loss.weight.std() > 0
    torch.testing.assert_close(loaded.relation_loss.state_dict(), module.relation_loss.state_dict())
    batch = collate(data.validation, 20)
    plain = module.eval().network(SeenBatch(batch)).logits
    torch.testing.assert_close(loaded.eval()(SeenBatch(batch)).logits, plain - 0.5 * module.relation_loss.log_prior)


def test_training_with_repeats_and_drops_repeats_exactly():
    weights = []
    for _ in range(2):
        data = SceneGraphData(repeat_threshold=0.3, instance_drop=1.6)
        data.train, data.validation = data.train[:32], data.validation[:8]
        pl.seed_everything(0, verbose=False)
        module = MotifsModule(**SMALL_MOTIFS)
        fitting = trainer()
        fitting.fit(module, datamodule=data)
        assert fitting.global_step > 2, "images of rare predicates must come several times"
        weights.append(module.network.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (MotifsModule, {"predicate_weights": "rare"}, "predicate_weights must be one of 'none'"),
        (MotifsModule, {"predicate_weight_power": -1.0}, "predicate_weight_power must be at least 0"),
        (MotifsModule, {"effective_number_beta": 1.0}, r"effective_number_beta must be in \[0, 1\), got 1.0"),
        (MotifsModule, {"logit_adjustment_test": float("nan")}, "logit_adjustment_test must be at least 0 and finite"),
        (SceneGraphData, {"repeat_threshold": -0.1}, "repeat_threshold must be at least 0"),
        (SceneGraphData, {"instance_drop": float("inf")}, "instance_drop must be at least 0 and finite"),
    ],
)
def test_bad_options_are_refused_by_name(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_unknown_weights_are_refused_by_name():
    with pytest.raises(ValueError, match="weights must be none, inverse_frequency or effective_number, got 'inverse'"):
        RelationLoss(torch.ones(3), weights="inverse")
