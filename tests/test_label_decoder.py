"""Tests of the label decoder against loops over single objects."""

import pytest
import torch

pytest.importorskip("torchvision")
from torchvision.ops import box_iou  # noqa: E402

from sgalign.models import LabelDecoder  # noqa: E402
from sgalign.models.label_decoder import commit_labels  # noqa: E402

CLASSES = 6


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return LabelDecoder(10, 7, CLASSES, embed_dim=4).eval()


def batch(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    places = torch.cat([torch.randperm(length, generator=generator) for length in lengths])
    return torch.randn(total, 10, generator=generator), torch.tensor(lengths), places


def one_by_one(decoder, inputs, places, labels=None):
    """Decode one image object by object with the cell's equations (Zellers et al., appendix; Zhang et al., 2016)."""
    hidden = memory = torch.zeros(7)
    before, logits, predicted = CLASSES, {}, {}
    for step in range(len(inputs)):
        row = places.tolist().index(step)
        gates = decoder.input(torch.cat([inputs[row], decoder.embedding.weight[before]])).split(7)
        state = decoder.state(hidden).split(7)
        enter, forget, leave, highway = (torch.sigmoid(gates[i] + state[i]) for i in (0, 1, 3, 4))
        memory = enter * torch.tanh(gates[2] + state[2]) + forget * memory
        hidden = highway * leave * torch.tanh(memory) + (1 - highway) * gates[5]
        logits[row] = decoder.out(hidden)
        before = int(logits[row][1:].argmax()) + 1
        if labels is not None and labels[row] > 0:
            before = int(labels[row])
        predicted[row] = before
    order = range(len(inputs))
    return torch.stack([logits[i] for i in order]), torch.tensor([predicted[i] for i in order])


@pytest.mark.parametrize("teacher", [False, True])
def test_a_batch_equals_decoding_each_object_by_itself(decoder, teacher):
    inputs, lengths, places = batch(3, 0, 5, 1, 5)
    labels = torch.randint(CLASSES, (14,), generator=torch.Generator().manual_seed(3)) if teacher else None
    logits, predicted = decoder(inputs, lengths, places, labels)
    parts = [x.split(lengths.tolist()) for x in (inputs, places, logits, predicted)]
    given = labels.split(lengths.tolist()) if teacher else [None] * 5
    for x, place, ours, our_labels, label in zip(*parts, given):
        if len(x):
            expected, expected_labels = one_by_one(decoder, x, place, label)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(our_labels, expected_labels) and (our_labels > 0).all()
    if teacher:
        assert torch.equal(predicted[labels > 0], labels[labels > 0])


def test_batches_without_objects_give_empty_results(decoder):
    for lengths in ((), (0,), (0, 0)):
        logits, predicted = decoder(torch.zeros(0, 10), torch.tensor(lengths).long(), torch.zeros(0).long())
        assert logits.shape == (0, CLASSES) and predicted.shape == (0,)


@pytest.fixture
def training(decoder):
    """The decoder in training mode and its arguments."""
    inputs, lengths, places = batch(4, 2)
    torch.manual_seed(0)
    return decoder.train(), (inputs, lengths, places, torch.ones(6, dtype=torch.int64))


def test_dropout_differs_between_training_steps(training):
    decoder, arguments = training
    first, _ = decoder(*arguments)
    second, _ = decoder(*arguments)
    assert not torch.equal(first, second)


def test_gradients_reach_every_parameter(training):
    decoder, arguments = training
    logits, _ = decoder(*arguments)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_class_vectors_replace_all_embeddings_but_the_start_token(decoder):
    vectors = torch.randn(CLASSES, 4)
    start = decoder.embedding.weight[-1].clone()
    decoder.load_class_vectors(vectors)
    assert torch.equal(decoder.embedding.weight[:-1], vectors) and torch.equal(decoder.embedding.weight[-1], start)


# ---- choosing a class for each detection


def commit_in_loops(logits, boxes, threshold):
    """Give the most probable class first. It then has probability 0 for overlapping detections."""
    scores = logits.softmax(1).tolist()
    labels = {}
    ruled_out = set()
    while len(labels) < len(logits):
        choices = [
            (0.0 if (i, c) in ruled_out else scores[i][c], -i, -c)
            for i in range(len(logits))
            for c in range(1, logits.shape[1])
            if i not in labels
        ]
        _, i, c = max(choices)
        i, c = -i, -c
        labels[i] = c
        larger = boxes[:, c].clone()
        larger[:, 2:] += 1
        iou = box_iou(larger, larger)[i]
        ruled_out |= {(j, c) for j in range(len(logits)) if iou[j] >= threshold}
    return torch.tensor([labels[i] for i in range(len(logits))])


@pytest.mark.parametrize("seed", range(5))
def test_committed_labels_are_those_of_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, CLASSES, generator=generator) * 2
    corner = torch.rand(9, CLASSES, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 20 + torch.rand(9, CLASSES, 2, generator=generator) * 40], -1)
    assert torch.equal(commit_labels(logits, boxes, 0.5), commit_in_loops(logits, boxes, 0.5))


def test_overlapping_detections_get_different_classes():
    logits = torch.tensor([[0.0, 5, 1, 0], [0, 4, 2, 0], [0, 5, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 50, 50], [1, 1, 51, 51], [200, 0, 250, 50]])[:, None].expand(3, 4, 4)
    assert commit_labels(logits, boxes, 0.5).tolist() == [1, 2, 1]
    assert commit_labels(logits, boxes, 0.99).tolist() == [1, 1, 1]


def test_a_detection_gets_a_class_even_if_every_class_is_ruled_out():
    boxes = torch.zeros(5, 3, 4) + torch.tensor([0.0, 0, 9, 9])
    assert (commit_labels(torch.randn(5, 3), boxes, 0.5) > 0).all()


@pytest.fixture
def overlapping(decoder):
    """Four detections in the same place, all most likely of class 3 because of a bias."""
    decoder.out.bias.data[3] = 10
    return *batch(4), torch.tensor([0.0, 0, 9, 9]).expand(4, CLASSES, 4)


def test_labels_are_committed_only_if_boxes_are_given(decoder, overlapping):
    inputs, lengths, places, boxes = overlapping
    _, greedy = decoder(inputs, lengths, places)
    logits, committed = decoder(inputs, lengths, places, boxes_per_class=boxes)
    assert greedy.tolist() == [3] * 4
    assert len(set(committed.tolist())) == 4 and torch.equal(committed, commit_labels(logits, boxes, 0.5))


def test_given_labels_are_returned_even_if_boxes_are_given(decoder, overlapping):
    """Training gives the labels."""
    inputs, lengths, places, boxes = overlapping
    _, labels = decoder(inputs, lengths, places, torch.full((4,), 2), boxes_per_class=boxes)
    assert labels.tolist() == [2] * 4
