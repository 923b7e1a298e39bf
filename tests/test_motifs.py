"""Tests of batches, of the frequency baseline and of Motifs."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
from trainers import SMALL_MOTIFS  # noqa: E402

from sgalign.data import SceneGraph, ScenesDataset, SeenBatch, VisualFeatures, collate  # noqa: E402
from sgalign.models import FrequencyBaseline, Motifs, predicate_counts  # noqa: E402
from sgalign.models.motifs import _Context, box_features, pair_features, right_to_left  # noqa: E402

OBJECTS, PREDICATES = 16, 20


def graph(boxes, labels, relations, image_id="a.jpg"):
    boxes, relations = torch.tensor(boxes, dtype=torch.float32), torch.tensor(relations, dtype=torch.int64)
    return SceneGraph(image_id, 100, 50, boxes.reshape(-1, 4), torch.tensor(labels).long(), relations.reshape(-1, 3))


@pytest.fixture(scope="module")
def scenes():
    return [ScenesDataset("train")[index] for index in range(40)]


@pytest.fixture(scope="module")
def counts(scenes):
    return predicate_counts(scenes, OBJECTS, PREDICATES)


@pytest.fixture
def motifs(counts):
    torch.manual_seed(0)
    return Motifs(counts, **SMALL_MOTIFS)


@pytest.fixture
def wide(counts):
    """A network with rows so wide that one projection serves both branches."""
    torch.manual_seed(0)
    return Motifs(counts, embed_dim=60, hidden_dim=4, relation_dim=16)


# ---- batches


TWO = graph([[0, 0, 9, 9], [5, 5, 20, 20]], [3, 4], [[0, 1, 2], [0, 1, 5], [0, 0, 7]])
THREE = graph([[0, 0, 9, 9]] * 3, [1, 2, 3], [[2, 0, 1], [2, 0, 1]])


@pytest.fixture
def batch():
    """Images with two, no, one and three objects."""
    return collate([TWO, graph([], [], [], "none"), graph([[1, 1, 2, 2]], [1], [], "one"), THREE], 7)


def test_a_batch_numbers_the_objects_of_each_image(batch):
    assert batch.lengths.tolist() == [2, 0, 1, 3] and batch.image_ids == ["a.jpg", "none", "one", "a.jpg"]
    assert batch.images.tolist() == [0, 0, 2, 3, 3, 3] and batch.positions.tolist() == [0, 1, 0, 0, 1, 2]


def test_a_batch_has_every_ordered_pair_of_an_image(batch):
    assert batch.pairs.tolist() == [[0, 1], [1, 0], [3, 4], [3, 5], [4, 3], [4, 5], [5, 3], [5, 4]]


def test_targets_share_a_pair_equally_between_its_predicates(batch):
    expected = torch.zeros(8, 8)
    expected[:, 0] = 1
    expected[0, [0, 2, 5]] = torch.tensor([0, 0.5, 0.5])  # the pair has two predicates
    expected[6, [0, 1]] = torch.tensor([0.0, 1])  # a repeated relation counts once
    assert torch.equal(batch.targets, expected)


def test_the_ground_truth_of_a_batch_keeps_relations_of_an_object_with_itself(batch):
    assert torch.equal(batch.truth[0]["relations"], TWO.relations)


def test_a_batch_may_have_no_pairs():
    batch = collate([graph([[1, 1, 2, 2]], [1], [])], 7)
    assert batch.pairs.shape == (0, 2) and batch.targets.shape == (0, 8)


def test_a_predicate_beyond_the_classes_is_refused_by_name():
    with pytest.raises(ValueError, match=r"image 'a\.jpg': relations\[:, 2\] must be from 1 to 4, got 5"):
        collate([graph([[0, 0, 9, 9]] * 2, [1, 1], [[0, 1, 5]])], 4)


# ---- frequency baseline


def test_predicates_are_counted_for_each_pair_of_classes():
    graphs = [graph([[0, 0, 9, 9]] * 3, [1, 2, 2], [[0, 1, 3], [0, 1, 3], [0, 2, 1]])]
    counts = predicate_counts(graphs, 2, 3)
    assert counts[1, 2].tolist() == [0, 1, 0, 2] and counts[2, 2].tolist() == [2, 0, 0, 0]
    assert counts[2, 1].tolist() == [2, 0, 0, 0] and not counts[0].any() and not counts[1, 1].any()


def test_the_frequency_baseline_is_the_logarithm_of_smoothed_shares(counts, scenes):
    batch = collate(scenes[:3], PREDICATES)
    logits = FrequencyBaseline(counts)(batch)
    subject, object_ = batch.labels[batch.pairs[5]]
    row = counts[subject, object_].clone()
    row[0] += 1
    torch.testing.assert_close(logits[5], torch.log(row / row.sum() + 1e-3))


def test_the_frequency_baseline_is_not_trained(counts):
    assert not list(p for p in FrequencyBaseline(counts).parameters() if p.requires_grad)


def test_gradients_of_the_frequencies_are_the_same_bits_for_any_number_of_threads(threads):
    """Most pairs of the batch have one of a few pairs of classes, so many gradients are added up."""
    draw = torch.Generator().manual_seed(0)
    baseline = FrequencyBaseline(torch.ones(5, 5, 71), trainable=True)
    objects = [graph([[0, 0, 9, 9]] * 20, torch.randint(1, 5, (20,), generator=draw).tolist(), []) for _ in range(4)]
    batch = collate(objects, 70)
    grad = torch.randn(len(batch.pairs), 71, generator=draw)
    found = []
    for count in (1, 2, 4, 2, 4):
        threads(count)
        found += torch.autograd.grad(baseline(batch), baseline.logits, grad)
    assert all(torch.equal(one, found[0]) for one in found)


# ---- Motifs


def test_box_features_are_relative_to_the_image():
    features = box_features(torch.tensor([[10.0, 20, 29, 29]]), torch.tensor([[100.0, 50]]))
    expected = [20 / 100, 10 / 50, 20 / 100, 25 / 50, 10 / 100, 20 / 50, 29 / 100, 29 / 50, 0.2 * 0.2]
    torch.testing.assert_close(features, torch.tensor([expected]))


@pytest.fixture
def two_boxes():
    return collate([graph([[0, 0, 9, 9], [5, 0, 24, 9]], [1, 2], [])], 3)


def test_pair_features_compare_the_boxes(two_boxes):
    relative = pair_features(two_boxes)[0, 27:]
    expected = torch.tensor([torch.asinh(torch.tensor(10 / 10)), 0, torch.log(torch.tensor(2.0)), 0, 50 / 250])
    torch.testing.assert_close(relative, expected)


def test_pair_features_contain_the_enclosing_box(two_boxes):
    around = pair_features(two_boxes)[:, 18:27]
    torch.testing.assert_close(around[0], box_features(torch.tensor([[0.0, 0, 24, 9]]), torch.tensor([[100.0, 50]]))[0])
    assert torch.equal(around[0], around[1])


def test_objects_are_ordered_from_right_to_left_in_each_image():
    first = graph([[0, 0, 9, 9], [50, 0, 59, 9], [20, 0, 29, 9]], [1, 1, 1], [])
    second = graph([[80, 0, 89, 9], [80, 5, 89, 9]], [1, 1], [])
    assert right_to_left(collate([first, second], 3)).tolist() == [2, 0, 1, 0, 1]


EMPTY = graph([], [], [])


def test_images_of_a_batch_do_not_influence_each_other(motifs, scenes):
    motifs.eval()
    together = motifs(SeenBatch(collate([scenes[0], EMPTY, scenes[1], scenes[2]], PREDICATES))).logits
    apart = torch.cat([motifs(SeenBatch(collate([scene], PREDICATES))).logits for scene in scenes[:3]])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_an_image_without_objects_has_no_logits(motifs):
    motifs.eval()
    assert motifs(SeenBatch(collate([EMPTY], PREDICATES))).logits.shape == (0, PREDICATES + 1)


def test_the_order_of_the_objects_does_not_matter(motifs, scenes):
    motifs.eval()
    scene, order = scenes[0], torch.randperm(len(scenes[0].labels), generator=torch.Generator().manual_seed(1))
    moved = SceneGraph(
        "b", scene.width, scene.height, scene.boxes[order], scene.labels[order], torch.zeros(0, 3).long()
    )
    before, after = collate([scene], PREDICATES), collate([moved], PREDICATES)
    row = {tuple(pair): logits for pair, logits in zip(before.pairs.tolist(), motifs(SeenBatch(before)).logits)}
    expected = torch.stack([row[int(order[s]), int(order[o])] for s, o in after.pairs.tolist()])
    torch.testing.assert_close(motifs(SeenBatch(after)).logits, expected, atol=1e-4, rtol=1e-4)


def test_the_relation_head_equals_that_of_the_public_code(motifs, scenes):
    """The public code concatenates the two vectors of each pair and multiplies once."""
    batch = collate(scenes[:3], PREDICATES)
    shared = motifs.shared(SeenBatch(batch))
    (edge,) = motifs.edge_context(shared.edge_input, batch, shared.places)
    head, tail = motifs.head_tail(edge).chunk(2, dim=1)
    pair = motifs.pair(torch.cat([head[batch.pairs[:, 0]], tail[batch.pairs[:, 1]]], dim=1))
    usual = motifs.predicate(pair * shared.union) + shared.bias
    torch.testing.assert_close(motifs.branches(batch, shared, [edge], [motifs.predicate])[0], usual)


def test_gradients_reach_every_parameter(motifs, scenes):
    motifs(SeenBatch(collate(scenes[:4], PREDICATES))).logits.square().sum().backward()
    assert [name for name, p in motifs.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_mirror_without_a_mask_and_with_a_tied_head_is_the_supervised_branch(motifs, scenes):
    batch = collate(scenes[:6], PREDICATES)
    nothing = torch.zeros(len(batch.labels), 1, dtype=torch.bool)
    prediction, mirrored = motifs.dual_branch(SeenBatch(batch), motifs.predicate, dropped=nothing)
    torch.testing.assert_close(prediction.logits, mirrored, rtol=1e-5, atol=1e-5)
    prediction, _ = motifs.eval().dual_branch(SeenBatch(batch), motifs.predicate, dropped=nothing)
    torch.testing.assert_close(motifs(SeenBatch(batch)).logits, prediction.logits)


def test_a_mask_changes_only_the_mirror_and_only_in_its_image(motifs, scenes):
    motifs.eval()
    batch = collate(scenes[:2], PREDICATES)
    dropped = torch.zeros(len(batch.labels), 1, dtype=torch.bool)
    dropped[0] = True
    prediction, mirrored = motifs.dual_branch(SeenBatch(batch), motifs.predicate, dropped=dropped)
    torch.testing.assert_close(prediction.logits, motifs(SeenBatch(batch)).logits)
    changed = (prediction.logits - mirrored).abs().amax(1) > 1e-6
    of_first_image = batch.images[batch.pairs[:, 0]] == 0
    assert changed[of_first_image].any() and not changed[~of_first_image].any()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_projecting_rows_once_equals_projecting_them_twice(scenes, ratio):
    """In float64, outputs and the gradients of every weight and of the input agree."""
    torch.manual_seed(0)
    context = _Context(40, 6).double()
    batch = collate([scenes[0], graph([], [], []), *scenes[1:4], graph([[1, 1, 9, 9]], [1], [])], PREDICATES)
    places, inputs = right_to_left(batch), torch.randn(len(batch.labels), 40, dtype=torch.float64)
    dropped = torch.rand(len(inputs), 1) < ratio
    results = []
    for once in (False, True):
        context.zero_grad()
        leaf = inputs.clone().requires_grad_()
        if once:
            outs = context.projected_once(leaf, batch, places, dropped)
        else:
            outs = context.packed([leaf, leaf.masked_fill(dropped, 0)], batch, places)
        (outs[0].sin().sum() + outs[1].square().sum()).backward()
        results.append([*outs, leaf.grad, *(p.grad.clone() for p in context.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_wide_rows_are_projected_once_with_the_same_result(wide, scenes):
    batch = collate(scenes[:4], PREDICATES)
    dropped = torch.rand(len(batch.labels), 1) < 0.3
    called = []
    wide.edge_context.lstm.register_forward_hook(lambda *_: called.append(1))
    (prediction, mirrored) = wide.dual_branch(SeenBatch(batch), wide.predicate, dropped=dropped)
    assert not called, "the LSTM projects the rows of both branches"
    shared = wide.shared(SeenBatch(batch))
    inputs = [shared.edge_input, shared.edge_input.masked_fill(dropped, 0)]
    edges = wide.edge_context.packed(inputs, batch, shared.places)
    for ours, theirs in zip((prediction.logits, mirrored), wide.branches(batch, shared, edges, [wide.predicate] * 2)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (alone,) = wide.edge_context(shared.edge_input, batch, shared.places)
    torch.testing.assert_close(alone, edges[0], rtol=1e-4, atol=1e-4)


def test_wide_rows_without_a_mask_give_equal_branches(wide, scenes):
    batch = collate(scenes[:4], PREDICATES)
    dropped = torch.zeros(len(batch.labels), 1, dtype=torch.bool)
    prediction, mirrored = wide.dual_branch(SeenBatch(batch), wide.predicate, dropped=dropped)
    torch.testing.assert_close(prediction.logits, mirrored, rtol=1e-5, atol=1e-5)


def test_wide_rows_under_autocast_stay_close_and_all_weights_learn(wide, scenes):
    batch = collate(scenes[:4], PREDICATES)
    dropped = torch.rand(len(batch.labels), 1) < 0.3
    exact, _ = wide.dual_branch(SeenBatch(batch), wide.predicate, dropped=dropped)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, mirrored = wide.dual_branch(SeenBatch(batch), wide.predicate, dropped=dropped)
    (prediction.logits.float().square().mean() + mirrored.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.parameters())
    assert (prediction.logits.float() - exact.logits).abs().max() < 0.1 * exact.logits.abs().max()


def test_a_network_of_visual_features_needs_them(counts, scenes):
    batch = collate(scenes[:2], PREDICATES)
    with pytest.raises(ValueError, match="batch must have features for a model with object_dim"):
        Motifs(counts, object_dim=16, **SMALL_MOTIFS)(SeenBatch(batch))


def test_a_network_that_decodes_labels_needs_the_logits_of_the_detector(counts, scenes):
    batch = collate(scenes[:2], PREDICATES)
    features = VisualFeatures(torch.zeros(len(batch.labels), 16), torch.zeros(len(batch.pairs), 16))
    with pytest.raises(ValueError, match="batch must have the detector's logits for a model that decodes labels"):
        Motifs(counts, object_dim=16, decodes_labels=True, **SMALL_MOTIFS)(SeenBatch(batch, features))


def test_the_kept_pairs_keep_their_cached_features(scenes):
    batch = collate(scenes[:2], PREDICATES)
    features = VisualFeatures(torch.zeros(len(batch.labels), 16), torch.arange(len(batch.pairs)))
    kept = batch._replace(features=features).keep_pairs(torch.tensor([3]))
    assert kept.features.unions.tolist() == [3] and torch.equal(kept.pairs, batch.pairs[3:4])


def test_class_vectors_are_the_initial_embeddings(motifs):
    vectors = torch.randn(OBJECTS + 1, 12)
    motifs.load_class_vectors(vectors)
    assert torch.equal(motifs.object_embedding.weight, vectors) and torch.equal(motifs.edge_embedding.weight, vectors)


def test_class_vectors_of_another_shape_are_refused(motifs):
    vectors = torch.randn(OBJECTS + 1, 12)
    with pytest.raises(ValueError, match=r"vectors must be \[17, 12\] \(classes, embed_dim\), got \[17, 10\]"):
        motifs.load_class_vectors(vectors[:, :10])
