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
    """One image, an object at a time, from the cell's equations (Zellers et al., appendix; Zhang et al., 2016)."""
    hidden = memory = torch.zeros(7)
    before, logits, said = CLASSES, {}, {}
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
        said[row] = before
    order = range(len(inputs))
    return torch.stack([logits[i] for i in order]), torch.tensor([said[i] for i in order])


@pytest.mark.parametrize("teacher", [False, True])
def test_images_together_are_images_one_object_at_a_time(decoder, teacher):
    inputs, lengths, places = batch(3, 0, 5, 1, 5)
    labels = torch.randint(CLASSES, (14,), generator=torch.Generator().manual_seed(3)) if teacher else None
    logits, predicted = decoder(inputs, lengths, places, labels)
    parts = [x.split(lengths.tolist()) for x in (inputs, places, logits, predicted)]
    told = labels.split(lengths.tolist()) if teacher else [None] * 5
    for x, place, ours, said, label in zip(*parts, told):
        if len(x):
            expected, expected_said = one_by_one(decoder, x, place, label)
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
            assert torch.equal(said, expected_said) and (said > 0).all()
    if teacher:
        assert torch.equal(predicted[labels > 0], labels[labels > 0])


def test_nothing_to_decode(decoder):
    for lengths in ((), (0,), (0, 0)):
        logits, predicted = decoder(torch.zeros(0, 10), torch.tensor(lengths).long(), torch.zeros(0).long())
        assert logits.shape == (0, CLASSES) and predicted.shape == (0,)


def test_gradients_and_dropout(decoder):
    inputs, lengths, places = batch(4, 2)
    decoder.train()
    labels = torch.ones(6, dtype=torch.int64)
    torch.manual_seed(0)
    first, _ = decoder(inputs, lengths, places, labels)
    second, _ = decoder(inputs, lengths, places, labels)
    assert not torch.equal(first, second), "another dropout mask"
    first.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_class_vectors(decoder):
    vectors = torch.randn(CLASSES, 4)
    start = decoder.embedding.weight[-1].clone()
    decoder.load_class_vectors(vectors)
    assert torch.equal(decoder.embedding.weight[:-1], vectors) and torch.equal(decoder.embedding.weight[-1], start)


# ---- committing classes


def commit_by_hand(logits, boxes, threshold):
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
def test_commitment_by_hand(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(9, CLASSES, generator=generator) * 2
    corner = torch.rand(9, CLASSES, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 20 + torch.rand(9, CLASSES, 2, generator=generator) * 40], -1)
    assert torch.equal(commit_labels(logits, boxes, 0.5), commit_by_hand(logits, boxes, 0.5))


def test_two_detections_of_one_thing_differ_in_class(decoder):
    logits = torch.tensor([[0.0, 5, 1, 0], [0, 4, 2, 0], [0, 5, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 50, 50], [1, 1, 51, 51], [200, 0, 250, 50]])[:, None].expand(3, 4, 4)
    assert commit_labels(logits, boxes, 0.5).tolist() == [1, 2, 1]
    assert commit_labels(logits, boxes, 0.99).tolist() == [1, 1, 1]


def test_every_class_ruled_out_still_gives_a_class():
    boxes = torch.zeros(5, 3, 4) + torch.tensor([0.0, 0, 9, 9])
    assert (commit_labels(torch.randn(5, 3), boxes, 0.5) > 0).all()


def test_detections_are_committed_at_evaluation_only(decoder):
    """Four detections in one place: greedily all are of the class that a bias makes the likeliest."""
    inputs, lengths, places = batch(4)
    decoder.out.bias.data[3] = 10
    boxes = torch.tensor([0.0, 0, 9, 9]).expand(4, CLASSES, 4)
    _, greedy = decoder(inputs, lengths, places)
    logits, committed = decoder(inputs, lengths, places, boxes_per_class=boxes)
    assert greedy.tolist() == [3] * 4
    assert len(set(committed.tolist())) == 4 and torch.equal(committed, commit_labels(logits, boxes, 0.5))
    # Told the classes, as in training, it says them, whatever the boxes.
    _, told = decoder(inputs, lengths, places, torch.full((4,), 2), boxes_per_class=boxes)
    assert told.tolist() == [2] * 4
