"""Tests of the pairs that training draws from annotated objects and from detections."""

import pytest
import torch

pytest.importorskip("torchvision")
from sgalign.training.sampling import match_detections, sample_pairs  # noqa: E402


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- pairs of annotated objects


def test_limits_on_pairs_hold_in_each_image():
    images = torch.tensor([0] * 100 + [2] * 30 + [3] * 5)
    related = torch.rand(135, generator=generator(1)) < 0.6
    rows = sample_pairs(related, images, limit=20, positive_fraction=0.25, generator=generator())
    assert torch.equal(rows, rows.unique())
    for image in (0, 2, 3):
        kept, there = rows[images[rows] == image], images == image
        positive = int(related[kept].sum())
        assert positive == min(5, int((related & there).sum()))
        assert len(kept) - positive == min(20 - positive, int((~related & there).sum()))


def test_a_sample_contains_at_least_one_related_pair():
    related = torch.arange(20) < 5
    for limit in (1, 2, 3):
        rows = sample_pairs(related, torch.zeros(20).long(), limit=limit, generator=generator())
        assert len(rows) == limit and related[rows].sum() == 1


def test_few_pairs_are_all_kept():
    related = torch.tensor([True, False, False, True])
    assert sample_pairs(related, torch.zeros(4).long(), generator=generator()).tolist() == [0, 1, 2, 3]


def test_no_pairs_give_an_empty_sample():
    related = torch.tensor([True, False, False, True])
    assert sample_pairs(related[:0], torch.zeros(0).long(), generator=generator()).shape == (0,)


def test_related_pairs_are_drawn_equally_often_and_so_are_the_others():
    related = torch.arange(40) < 10
    counts = torch.zeros(40)
    for seed in range(400):
        rows = sample_pairs(related, torch.zeros(40).long(), limit=8, positive_fraction=0.5, generator=generator(seed))
        counts[rows] += 1
    # 400 draws of 4 of 10 and of 4 of 30 pairs may deviate by five standard deviations.
    assert (counts[:10] - 160).abs().max() < 5 * (400 * 0.4 * 0.6) ** 0.5
    assert (counts[10:] - 400 * 4 / 30).abs().max() < 5 * (400 * 4 / 30) ** 0.5


def test_samples_depend_only_on_the_given_generator():
    related = torch.arange(40) < 10
    state = torch.get_rng_state()
    again = [sample_pairs(related, torch.zeros(40).long(), limit=8, generator=generator(3)) for _ in range(2)]
    assert torch.equal(*again) and torch.equal(state, torch.get_rng_state())


# ---- detections

TRUE_BOXES = torch.tensor([[0.0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 100, 300]])
TRUE_LABELS = torch.tensor([3, 5, 3])
RELATIONS = torch.tensor([[0, 1, 2], [0, 1, 4], [1, 2, 1]])


def match(boxes, relations=RELATIONS, **options):
    options = {"num_predicates": 4, "generator": generator()} | options
    return match_detections(torch.tensor(boxes).float().reshape(-1, 4), TRUE_BOXES, TRUE_LABELS, relations, **options)


def test_detections_take_the_class_and_relations_of_the_objects_that_they_overlap():
    pairs, targets, labels = match([[0, 0, 100, 90], [210, 0, 300, 100], [0, 210, 100, 300], [400, 400, 500, 500]])
    assert labels.tolist() == [3, 5, 3, 0]
    found = {tuple(pair): target.tolist() for pair, target in zip(pairs.tolist(), targets)}
    assert found[0, 1] == [0, 0, 0.5, 0, 0.5] and found[1, 2] == [0, 1, 0, 0, 0]
    # All other pairs of matched detections are background. Pairs with an unmatched detection are left out.
    assert sorted(found) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert all(found[pair] == [1, 0, 0, 0, 0] for pair in ((0, 2), (1, 0), (2, 0), (2, 1)))


def test_a_matched_detection_has_an_iou_above_one_half():
    _, _, labels = match([[0, 0, 100, 50], [0, 0, 100, 51]])
    assert labels.tolist() == [0, 3]


def test_detections_of_a_pair_are_drawn_in_proportion_to_their_overlap():
    close, loose = [0, 0, 100, 100], [0, 0, 100, 60]
    boxes = [close, loose, [200, 0, 300, 100]]
    drawn = torch.zeros(2)
    for seed in range(300):
        pairs, targets, _ = match(boxes, RELATIONS[:1], per_relation=1, generator=generator(seed))
        positive = pairs[targets[:, 0] == 0]
        assert len(positive) == 1 and positive[0, 1] == 2
        drawn[positive[0, 0]] += 1
        # The pair that was not drawn has the relation too, so it must not serve as background.
        assert len(pairs[(pairs[:, 1] == 2)]) == 1
    assert abs(drawn[1] / 300 - 0.6 / 1.6) < 5 * (0.375 * 0.625 / 300) ** 0.5


def test_limits_hold_for_pairs_of_detections():
    boxes = [[i, 0, 100 + i, 100] for i in range(10)] + [[200 + i, 0, 300 + i, 100] for i in range(10)]
    pairs, targets, _ = match(boxes, per_relation=30, limit=40, positive_fraction=0.25)
    assert len(pairs) == 40 and int((targets[:, 0] == 0).sum()) == 10
    torch.testing.assert_close(targets.sum(1), torch.ones(40))


def test_images_without_matches_or_relations_give_no_pairs():
    for boxes, relations in (([], RELATIONS), ([[0, 0, 9, 9]], RELATIONS), ([[0, 0, 100, 100]], RELATIONS[:0])):
        pairs, targets, labels = match(boxes, relations)
        assert pairs.shape == (0, 2) and targets.shape == (0, 5) and len(labels) == len(boxes)


def test_images_without_annotations_give_no_pairs():
    empty = torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 3).long()
    pairs, _, labels = match_detections(TRUE_BOXES, *empty, num_predicates=4, generator=generator())
    assert len(pairs) == 0 and labels.tolist() == [0, 0, 0]
