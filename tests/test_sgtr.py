"""Tests of SGTR and its mirror against plain loops over roles, queries and candidates."""

import itertools
import math
import shutil

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sgalign import relation_alignment_loss
from sgalign.ops import reference
from sgalign.ops.random_mask import ratio_threshold

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pl = pytest.importorskip("lightning.pytorch")

from torchvision.ops import box_convert, box_iou, generalized_box_iou  # noqa: E402
from trainers import CONFIGS, SMALL_DETR, trainer_without_sanity_check  # noqa: E402
from trainers import SMALL_SGTR as SMALL  # noqa: E402

from sgalign.commands.main import main  # noqa: E402
from sgalign.data import Detections, ScenesDataset, collate, read_detections  # noqa: E402
from sgalign.models.entity_detector import DetectedEntities, EntityDetector, resize  # noqa: E402
from sgalign.models.graph_assembly import (  # noqa: E402
    Annotations,
    Entities,
    assemble,
    assembling_scores,
    match,
    pairwise_giou,
    relation_losses,
)
from sgalign.models.sgtr import SGTR, MirrorMask, RelationOutputs, RoleLinear, RoleNorm, sine_embedding  # noqa: E402
from sgalign.models.sgtr_weights import load_published  # noqa: E402
from sgalign.training import (  # noqa: E402
    AlignSGTRModule,
    DetectionWriter,
    EntityDetectorModule,
    SceneGraphData,
    SGTRModule,
    TripletWriter,
    load_module,
)
from sgalign.training.augmentation import annotations_of, mirrored_boxes, mirrored_predicates  # noqa: E402

OBJECTS, PREDICATES, QUERIES, DIM, HEADS = 5, 4, 7, 16, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(**options):
    options = {"dim": DIM, "heads": HEADS, "ffn_dim": 24, "layers": 3, "encoder_layers": 1} | options
    return SGTR(OBJECTS, PREDICATES, num_queries=QUERIES, dropout=0.0, **options).double()


def mirrored_heads(net):
    return tuple(head.double() for head in net.new_heads())


def entities(images=2, positions=11, count=6, layers=2):
    padding = torch.zeros(images, positions, dtype=torch.bool)
    padding[0, 8:] = True
    return DetectedEntities(
        torch.randn(images, positions, DIM, dtype=torch.float64),
        torch.randn(images, positions, DIM, dtype=torch.float64),
        padding,
        torch.randn(images, count, DIM, dtype=torch.float64),
        torch.randn(layers, images, count, OBJECTS + 1, dtype=torch.float64),
        torch.rand(layers, images, count, 4, dtype=torch.float64) * 0.5 + 0.1,
    )


def outputs(layers=2, images=2, queries=QUERIES, classes=PREDICATES):
    return RelationOutputs(
        torch.randn(layers, images, queries, classes),
        torch.rand(layers, images, queries, 4),
        torch.randn(2, layers, images, queries, OBJECTS + 1),
        torch.rand(2, layers, images, queries, 4) * 0.4 + 0.1,
    )


def annotation(relations):
    labels = torch.randint(OBJECTS, (2, relations))
    return Annotations(torch.randint(PREDICATES, (relations,)), labels, torch.rand(2, relations, 4) * 0.4 + 0.1)


# ---- layers


def attend(query, key, value, dropped, heads):
    """Return the attention's output `[L, dim]` of one image and role."""
    outs = []
    for head, (q, k, v) in enumerate(zip(*(t.chunk(heads, -1) for t in (query, key, value)))):
        scores = q @ k.T / math.sqrt(q.shape[-1])
        outs.append(scores.masked_fill(dropped[head], -math.inf).softmax(-1) @ v)
    return torch.cat(outs, -1)


def plain_decoder(net, found, contents, mask=None):
    """Return the states of the decoder, computed for each image, layer and role in loops.

    With a mask, they are the states of the mirrored branch.
    """
    memory = found.memory[None]
    for layer in net.encoder:
        memory = layer(memory, found.position, found.padding)
    memory = net.encoder_norm(memory)[0]
    images, length, count = len(memory), memory.shape[1], found.features.shape[1]

    def linear(layer, role, x):
        return functional.linear(x, layer.weight[role], layer.bias[role])

    def norm(layer, role, x):
        row = role if layer.shared is None else layer.shared[role]
        return functional.layer_norm(x, (DIM,), layer.weight[row], layer.bias[row])

    states = []
    x = {(role, image): contents[role, image] for role in range(3) for image in range(images)}
    for number in range(net.layers):
        for image, role in itertools.product(range(images), range(3)):
            state, position = x[role, image], net.queries[role, 0]
            block = net.self_attention[number]
            normed = norm(block.norm, role, state)
            query, key = linear(block.query_key, role, normed + position).chunk(2, -1)
            nothing = torch.zeros(HEADS, QUERIES, QUERIES, dtype=torch.bool)
            seen = attend(query, key, linear(block.value, role, normed), nothing, HEADS)
            state = state + linear(block.out, role, seen)

            block = net.cross_attention[number]
            query = linear(block.query, role, norm(block.norm, role, state) + position)
            rows = slice(number * DIM, (number + 1) * DIM)
            if role == 0:
                key = linear(net.memory_keys, 0, memory[image] + found.position[image])[:, rows]
                value = linear(net.memory_values, 0, memory[image])[:, rows]
                dropped = found.padding[image].expand(HEADS, QUERIES, -1)
                place, stream, batch, keys = image, 2 * number, images, length
            else:
                both = linear(net.entity_keys_values, role - 1, found.features[image])
                key, value = both[:, 2 * number * DIM : 2 * (number + 1) * DIM].chunk(2, -1)
                dropped = torch.zeros(HEADS, QUERIES, count, dtype=torch.bool)
                place, stream, batch, keys = (role - 1) * images + image, 2 * number + 1, 2 * images, count
            if mask is not None:
                random = reference.random_mask(
                    batch * HEADS, QUERIES, keys, threshold=ratio_threshold(mask.ratio),
                    seed=torch.tensor(mask.seed), stream=stream, device=torch.device("cpu"),
                )  # fmt: skip
                dropped = dropped | random.view(batch, HEADS, QUERIES, keys)[place]
            state = state + linear(block.out, role, attend(query, key, value, dropped, HEADS))

            block = net.feed_forward[number]
            hidden = linear(block.inner, role, norm(block.norm, role, state)).relu()
            x[role, image] = norm(net.decoder_norm, role, state + linear(block.outer, role, hidden))
        for image in range(images):
            fused = linear(net.fusion, 0, x[1, image]) + linear(net.fusion, 1, x[2, image])
            x[0, image] = x[0, image] + fused.relu()
        states.append(torch.stack([torch.stack([x[role, i] for i in range(images)]) for role in range(3)]))
    return torch.stack(states, dim=1)


def test_each_role_has_its_own_linear_layer_and_subject_and_object_may_share_a_norm():
    layer, norm = RoleLinear(3, 4, 6), RoleNorm(3, 6, shared=(0, 1, 1))
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 2, 5, 4)
    for role in range(3):
        expected = functional.linear(x[role], layer.weight[role], layer.bias[role])
        torch.testing.assert_close(layer(x)[role], expected)
        torch.testing.assert_close(layer.batched(x)[role], expected)
        row = min(role, 1)
        expected = functional.layer_norm(expected, (6,), norm.weight[row], norm.bias[row])
        torch.testing.assert_close(norm(layer(x))[role], expected)
    assert norm.weight.shape == (2, 6)


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_both_branches_equal_plain_decoders(ratio):
    net, found, mask = network(), entities(), MirrorMask(ratio, 1234)
    heads = net.predicate, net.entity_class
    contents = net._contents(found)
    supervised, mirrored = net.dual_branch(found, heads, mask)
    for got, states in (
        (supervised, plain_decoder(net, found, contents)),
        (mirrored, plain_decoder(net, found, contents, mask)),
    ):
        expected = net._outputs(states, *heads)
        for name, one, other in zip(got._fields, got, expected if got is supervised else expected.at(-1)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
    if ratio:
        assert not torch.allclose(supervised.at(-1).logits, mirrored.logits)


def test_the_mirror_does_not_change_the_supervised_branch():
    net, found = network(), entities()
    alone = net(found)
    together, _ = net.dual_branch(found, mirrored_heads(net), MirrorMask(0.5, 3))
    for one, other in zip(alone, together):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_branches_are_equal_without_a_mask():
    net, found = network(), entities()
    supervised, mirrored = net.dual_branch(found, (net.predicate, net.entity_class), MirrorMask(0.0, 3))
    for one, other in zip(supervised.at(-1), mirrored):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)  # products may be rounded differently


def test_padding_is_never_attended_to():
    net, found = network(), entities()
    heads = mirrored_heads(net)
    expected = net.dual_branch(found, heads, MirrorMask(0.3, 3))
    found.memory[found.padding] = torch.randn(3, DIM, dtype=torch.float64) * 100
    for ours, theirs in zip(net.dual_branch(found, heads, MirrorMask(0.3, 3)), expected):
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class CountedCalls(TorchDispatchMode):
    """A mode that counts the operator calls. A GPU launches a kernel for most of them."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_the_mirror_needs_at_most_35_percent_more_operator_calls():
    """The network has six layers and a predicate encoder of three, as published. Matching and losses count too."""
    net, found = network(layers=6, encoder_layers=3), entities()
    heads, truths = mirrored_heads(net), [annotation(3), annotation(2)]
    candidates = Entities.detected(found.logits[-1], found.boxes[-1])

    def calls(mirror):
        with CountedCalls() as counter:
            if mirror:
                predicted, mirrored = net.dual_branch(found, heads, MirrorMask(0.1, 3))
            else:
                predicted = net(found)
            matches = match(predicted, candidates, torch.ones(2, 2), truths)
            losses = relation_losses(predicted, truths, matches, focal=True, relations=5.0)
            loss = torch.stack(list(losses.values())).sum()
            if mirror:
                last = predicted.at(-1)
                loss = loss + relation_alignment_loss(
                    last.logits.flatten(0, -2), mirrored.logits.flatten(0, -2), kind="sigmoid"
                )
                for role in (0, 1):
                    teacher, student = last.class_logits[role], mirrored.class_logits[role]
                    loss = loss + relation_alignment_loss(teacher.flatten(0, -2), student.flatten(0, -2))
            loss.backward()
        return counter.calls

    assert calls(mirror=True) < 1.35 * calls(mirror=False)


@pytest.mark.parametrize("branches", [1, 2])  # In the first layer the branches are equal, so there is one input.
def test_attention_weights_for_figures_give_the_output_of_the_kernel(branches):
    net, found, mask = network(), entities(), MirrorMask(0.4, 7)
    memories = net._memories(found)[1]
    x = torch.randn(3, 2 * branches, QUERIES, DIM, dtype=torch.float64)
    block = net.cross_attention[1]
    weights = block.weights(x, net.queries, memories, mask, stream=2)
    parts = []
    for memory, both in zip(memories, weights):
        outs = [block.merge(w.flatten(0, 1) @ memory.value, len(w)) for w in both]
        parts.append(torch.cat(outs, dim=1))
    expected = x.repeat(1, 3 - branches, 1, 1) + block.out(torch.cat(parts))
    torch.testing.assert_close(block(x, net.queries, memories, mask, stream=2), expected)
    torch.testing.assert_close(weights[1][1].sum(-1), torch.ones(2, 2, HEADS, QUERIES, dtype=torch.float64))


def test_every_weight_gets_a_gradient():
    net, found = network(), entities()
    heads = mirrored_heads(net)
    supervised, mirrored = net.dual_branch(found, heads, MirrorMask(0.3, 3))
    sum(t.square().sum() for t in (*supervised, *mirrored)).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- assembling, matching, losses


def test_pairwise_giou_equals_that_of_torchvision():
    boxes, others = torch.rand(3, 5, 4), torch.rand(4, 4)
    expected = [generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (image, others))) for image in boxes]
    torch.testing.assert_close(pairwise_giou(boxes, others), torch.stack(expected))


def test_the_giou_of_empty_boxes_is_finite():
    assert pairwise_giou(torch.zeros(1, 4), torch.zeros(1, 4)).isfinite().all()


def test_assembling_scores_follow_their_definition():
    predicted, found = outputs(), Entities(torch.rand(2, 6, OBJECTS), torch.rand(2, 6, 4) * 0.4 + 0.1)
    sizes = torch.tensor([[100.0, 50.0], [40.0, 80.0]])
    scores = assembling_scores(predicted, found, sizes)
    assert scores.shape == (2, 2, 2, QUERIES, 6)
    for role, layer, image, query, entity in itertools.product(range(2), range(2), range(2), range(QUERIES), range(6)):
        p = predicted.class_logits[role, layer, image, query].softmax(0)[:-1]
        q, box = found.probabilities[image, entity], found.boxes[image, entity]
        similarity = functional.cosine_similarity(p, q, dim=0)
        overlap = generalized_box_iou(
            *(box_convert(b[None], "cxcywh", "xyxy") for b in (predicted.boxes[role, layer, image, query], box))
        )
        away = predicted.vectors[layer, image, query, 2 * role : 2 * role + 2] - box[:2]
        distance = (away * sizes[image]).abs().sum()
        expected = similarity**0.6 * overlap.clamp(min=0)[0, 0] * q.max() ** 0.6 / (distance + 1)
        torch.testing.assert_close(scores[role, layer, image, query, entity], expected, rtol=1e-4, atol=1e-6)


def test_the_matching_has_the_lowest_cost():
    """The cost is computed in loops over queries, candidate pairs and relations."""
    predicted, sizes = outputs(layers=1, images=1, queries=3), torch.tensor([[100.0, 50.0]])
    found, truth = Entities(torch.rand(1, 4, OBJECTS), torch.rand(1, 4, 4) * 0.4 + 0.1), annotation(2)
    scores = assembling_scores(predicted, found, sizes)[:, 0, 0]
    ranked = scores.sort(dim=-1, descending=True)
    costs = torch.zeros(3, 4, 2)
    for query, rank, relation in itertools.product(range(3), range(4), range(2)):
        subject, object_ = ranked.indices[:, query, rank].tolist()
        ends, boxes = truth.labels[:, relation], truth.boxes[:, relation]
        vector = torch.cat([boxes[0, :2], boxes[1, :2]])
        giou = [
            pairwise_giou(found.boxes[0, e][None], b[None])[0, 0].clamp(min=0)
            for e, b in zip((subject, object_), boxes)
        ]
        likely = found.probabilities[0, subject, ends[0]] + found.probabilities[0, object_, ends[1]]
        away = (found.boxes[0, subject] - boxes[0]).abs().sum() + (found.boxes[0, object_] - boxes[1]).abs().sum()
        costs[query, rank, relation] = (
            0.6 * (predicted.vectors[0, 0, query] - vector).abs().sum()
            + 32 ** -predicted.logits[0, 0, query].softmax(0)[truth.predicates[relation]]
            + 0.5 * 32**-likely
            + 0.6 * away / 2
            + 32 ** -(giou[0] + giou[1])
            + 0.01 * (1 - ranked.values[:, query, rank].mean())
        )
    flat = costs.flatten(0, 1)
    first, second = min(itertools.permutations(range(12), 2), key=lambda c: (flat[c[0], 0] + flat[c[1], 1]).item())
    ((query, relation),) = match(predicted, found, sizes, [truth])[0]
    expected = {0: first // 4, 1: second // 4}
    if expected[0] == expected[1]:
        cheaper = 0 if flat[first, 0] <= flat[second, 1] else 1
        expected = {cheaper: expected[cheaper]}
    assert dict(zip(relation.tolist(), query.tolist())) == expected


@pytest.fixture
def contested():
    """Arguments of `match` in which two relations have the same best query, number 3."""
    predicted, sizes = outputs(layers=1, images=1), torch.tensor([[100.0, 50.0]])
    found, truth = Entities(torch.rand(1, 6, OBJECTS), torch.rand(1, 6, 4) * 0.4 + 0.1), annotation(1)
    twice = Annotations(*(torch.cat([t, t], dim=min(t.dim() - 1, 1)) for t in truth))
    predicted.vectors[0, 0, 3] = truth.vectors[0]
    predicted.logits[0, 0, 3, truth.predicates[0]] = 20
    return predicted, found, sizes, [twice]


def test_matching_leaves_a_relation_out_if_another_one_takes_its_query(contested):
    """The public code does so too. The relation without a query has no effect on the losses."""
    ((query, _),) = match(*contested)[0]
    assert query.tolist() == [3]


def test_distinct_matching_gives_each_relation_a_query(contested):
    ((query, relation),) = match(*contested, distinct=True)[0]
    assert sorted(relation.tolist()) == [0, 1] and 3 in query.tolist() and len(set(query.tolist())) == 2


def test_distinct_matching_uses_every_query_if_there_are_more_relations(contested):
    predicted, found, sizes, _ = contested
    ((query, relation),) = match(predicted, found, sizes, [annotation(30)], distinct=True)[0]
    assert len(query) == len(set(relation.tolist())) == QUERIES


@pytest.mark.parametrize("distinct", [False, True])
def test_matching_without_entities_is_empty(distinct):
    predicted, none = outputs(images=2), Entities(torch.rand(2, 0, OBJECTS), torch.rand(2, 0, 4))
    matches = match(predicted, none, torch.ones(2, 2), [annotation(2), annotation(0)], distinct=distinct)
    assert len(matches) == len(predicted.logits)
    assert all(len(query) == len(relation) == 0 for layer in matches for query, relation in layer)


@pytest.mark.parametrize("relations", [0, 1, 30])
def test_no_query_serves_two_relations(relations):
    predicted, found = outputs(images=1), Entities(torch.rand(1, 6, OBJECTS), torch.rand(1, 6, 4) * 0.4 + 0.1)
    for ((query, relation),) in match(predicted, found, torch.ones(1, 2), [annotation(relations)]):
        assert len(query) == len(relation) <= min(relations, QUERIES)
        assert len(set(query.tolist())) == len(query) and len(set(relation.tolist())) == len(relation)
        assert (len(query) > 0) == (relations > 0)


@pytest.mark.parametrize("focal", [True, False])
def test_losses_are_those_of_loops(focal):
    predicted = outputs(classes=PREDICATES + (not focal))
    truths = [annotation(3), annotation(0)]
    matches = [[(torch.tensor([4, 1]), torch.tensor([0, 2])), (torch.tensor([], dtype=torch.int64),) * 2]] * 2
    got = relation_losses(predicted, truths, matches, focal=focal, relations=3.0)
    expected = dict.fromkeys(got, 0.0)
    for layer, factor in ((0, 0.5), (1, 1.0)):
        labels = torch.full((2, 2, QUERIES), OBJECTS)
        target = torch.full((2, QUERIES), PREDICATES)
        for query, relation in ((4, 0), (1, 2)):
            truth = truths[0]
            target[0, query], labels[:, 0, query] = truth.predicates[relation], truth.labels[:, relation]
            vector = torch.cat([truth.boxes[0, relation, :2], truth.boxes[1, relation, :2]])
            expected["vectors"] += factor * (predicted.vectors[layer, 0, query] - vector).abs().sum() / 3
            for role in (0, 1):
                box, true = predicted.boxes[role, layer, 0, query], truth.boxes[role, relation]
                giou = pairwise_giou(box[None], true[None])[0, 0]
                expected["boxes"] += factor * 0.5 * ((box - true).abs().sum() + 1 - giou) / 3
        no_object = torch.tensor([1.0] * OBJECTS + [0.1])
        for role in (0, 1):
            loss = functional.cross_entropy(
                predicted.class_logits[role, layer].flatten(0, 1), labels[role].flatten(), no_object
            )
            expected["classes"] += factor * 0.3 * loss
        if focal:
            one_hot = functional.one_hot(target, PREDICATES + 1)[..., :-1].float()
            p = predicted.logits[layer].sigmoid()
            positive = -0.25 * one_hot * (1 - p) ** 2 * p.log()
            negative = -0.75 * (1 - one_hot) * p**2 * (1 - p).log()
            expected["predicates"] += (positive + negative).sum() / 3
        else:
            weight = torch.tensor([1.0] * PREDICATES + [0.1])
            expected["predicates"] += factor * functional.cross_entropy(
                predicted.logits[layer].flatten(0, 1), target.flatten(), weight
            )
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("focal", "pairs"), [(True, 3), (False, 3), (True, 1)])
def test_assembled_graphs_are_those_of_loops(focal, pairs):
    """Loops take the best pairs of entities for each of the best predicates and then suppress repetitions."""
    suppressed = 0
    for _ in range(20):
        predicted = outputs(layers=1, images=1, classes=PREDICATES + (not focal)).at(0)
        boxes = torch.rand(1, 3, 4) * 0.2 + 0.3
        boxes = torch.cat([boxes, boxes + 0.002], 1)  # each entity has a near copy
        one_hot = functional.one_hot(torch.tensor([0, 1, 2, 0, 1, 2]), OBJECTS).float()
        found = Entities(one_hot[None] * torch.rand(1, 6, 1), boxes)
        sizes = torch.tensor([[100.0, 50.0]])
        ((triplets, scores),) = assemble(predicted, found, sizes, focal=focal, pairs=pairs)
        by_layer = RelationOutputs(*(t[None] for t in predicted[:2]), *(t[:, None] for t in predicted[2:]))
        rank = assembling_scores(by_layer, found, sizes)[:, 0, 0].sort(dim=-1, descending=True, stable=True).indices
        p = predicted.logits[0].sigmoid() if focal else predicted.logits[0].softmax(-1)[:, :-1]
        corners = box_convert(boxes[0], "cxcywh", "xyxy")
        iou, giou = box_iou(corners, corners), generalized_box_iou(corners, corners)
        candidates = []
        for place in p.flatten().sort(descending=True).indices[:QUERIES].tolist():
            query, predicate = divmod(place, PREDICATES)
            for subject, object_ in rank[:, query, :pairs].T.tolist():
                score = p[query, predicate] * found.confidence[0, subject] * found.confidence[0, object_]
                if subject != object_ and giou[subject, object_] < 0.95:
                    candidates.append((score.item(), subject, object_, predicate))
        kept = []
        for score, subject, object_, predicate in sorted(candidates, key=lambda c: -c[0]):
            same = [
                k for k in kept if k[3] == predicate
                and all(a == b or (iou[a, b] > 0.8 and a % 3 == b % 3) for a, b in ((k[1], subject), (k[2], object_)))
            ]  # fmt: skip
            suppressed += bool(same)
            if not same:
                kept.append((score, subject, object_, predicate))
        assert triplets.tolist() == [[s, o, predicate + 1] for _, s, o, predicate in kept]
        torch.testing.assert_close(scores, torch.tensor([k[0] for k in kept]))
    assert suppressed > (20 if pairs > 1 else 0)


def test_the_padding_of_given_entities_is_never_related():
    predicted = outputs(layers=1).at(0)
    labels, boxes = [torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.rand(3, 4) + 0.1, torch.rand(1, 4) + 0.1]
    graphs = assemble(predicted, Entities.given(labels, boxes, OBJECTS), torch.ones(2, 2), focal=True)
    assert len(graphs[0][0]) and not len(graphs[1][0])


# ---- the detector, images, training


def small_detector(num_queries=9):
    sizes = {"backbone": "resnet10", "stride": 16, "dim": 32, "heads": 4, "ffn_dim": 32, "layers": 2}
    return EntityDetector(OBJECTS, num_queries=num_queries, **sizes)


def test_the_detector_reads_images_of_any_size_together():
    detector = small_detector(num_queries=100).eval()
    wide, high = torch.rand(3, 48, 80), torch.rand(3, 96, 33)
    both = detector([wide, high])
    assert both.memory.shape == (2, 6 * 5, 32) and both.logits.shape == (2, 2, 100, OBJECTS + 1)
    assert both.padding.view(2, 6, 5).sum((1, 2)).tolist() == [15, 12]
    library = detector.detr(*detector.batch([wide, high]))
    torch.testing.assert_close(both.logits[-1], library.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.boxes[-1], library.pred_boxes, rtol=1e-4, atol=1e-5)


def test_boxes_and_positions_are_exact_in_bfloat16():
    detector, net = small_detector().eval(), SGTR(OBJECTS, PREDICATES, dim=32, heads=4, ffn_dim=32, layers=2).eval()
    images = [torch.rand(3, 400, 640)]
    exact = detector(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = detector(images)
        related = net(found)
    for values in (found.boxes, related.boxes, related.vectors):
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    torch.testing.assert_close(found.position.float(), exact.position, rtol=0, atol=0.003)


def test_a_network_in_bfloat16_reads_boxes_in_float32():
    net, found = network(), entities()
    expected = net(found).boxes
    given = DetectedEntities(*(part.bfloat16() if part.is_floating_point() else part for part in found))
    related = net.bfloat16()(given._replace(boxes=found.boxes.float()))
    torch.testing.assert_close(related.boxes.double(), expected, rtol=0, atol=0.02)


def test_losses_and_assembling_scores_are_exact_in_bfloat16():
    predicted = outputs()
    logits, class_logits = (predicted.logits - 6).bfloat16(), predicted.class_logits.bfloat16()
    predicted = predicted._replace(logits=logits, class_logits=class_logits)
    exact = predicted._replace(logits=logits.float(), class_logits=class_logits.float())
    found = Entities.detected(entities().logits[-1], entities().boxes[-1])
    sizes = torch.full((2, 2), 100.0)
    truths = [annotation(3), annotation(0)]
    matches = [[(torch.tensor([4, 1]), torch.tensor([0, 2])), (torch.tensor([], dtype=torch.int64),) * 2]] * 2
    results = []
    for given in (predicted, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=given is predicted):
            losses = [relation_losses(given, truths, matches, focal=f, relations=3.0) for f in (True, False)]
            results.append([assembling_scores(given, found, sizes), *losses])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_a_detector_is_made_from_the_weights_or_the_config_of_another(tmp_path):
    first = small_detector(num_queries=100)
    first.detr.save_pretrained(tmp_path / "detr")
    second = EntityDetector(OBJECTS + 2, weights=tmp_path / "detr")
    assert second.dim == 32 and second.detr.class_labels_classifier.out_features == OBJECTS + 3
    same = "model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(first.detr.state_dict()[same], second.detr.state_dict()[same])
    third = EntityDetector(OBJECTS + 2, config=second.config)
    third.load_state_dict(second.state_dict())


def test_no_gradient_of_a_new_detector_dominates_the_others():
    """The queries' contents start as zeros. With a bias of zero, their norm would multiply its gradient by 300."""
    detector = small_detector()
    found = detector([torch.rand(3, 64, 64) for _ in range(2)])
    (found.logits.square().mean() + found.boxes.square().mean()).backward()
    norms = {name: p.grad.norm().item() for name, p in detector.named_parameters() if p.grad is not None}
    assert norms["detr.model.decoder.layers.0.self_attn.o_proj.bias"] < 0.5 * math.hypot(*norms.values())
    assert found.features.std(1).mean() > 0.05, "the queries are nearly equal"


def test_the_feature_map_under_the_padding_has_no_effect():
    """Images are padded with zeros, as convolutions pad them, so only the feature map is disturbed."""
    detector, net = small_detector().eval(), SGTR(OBJECTS, PREDICATES, dim=32, heads=4, ffn_dim=32, layers=2).eval()
    images = [torch.rand(3, 48, 80), torch.rand(3, 96, 33)]
    found = detector(images)
    expected = net(found)
    backbone = detector.detr.model.backbone

    def disturb(module, arguments, output):
        feature_map, seen = output[-1]
        return [(feature_map + 100 * torch.randn_like(feature_map) * ~seen[:, None], seen)]

    with torch.no_grad():
        handle = backbone.register_forward_hook(disturb)
        other = detector(images)
        handle.remove()
        assert not torch.allclose(other.memory, found.memory)
        for name in ("features", "logits", "boxes"):
            torch.testing.assert_close(getattr(other, name), getattr(found, name), rtol=1e-3, atol=1e-4)
        for one, two in zip(net(other), expected):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_resizing_respects_the_limits_of_both_sides():
    assert resize(torch.rand(3, 100, 200), 50, 1000).shape == (3, 50, 100)
    assert resize(torch.rand(3, 100, 200), 80, 120).shape == (3, 60, 120)


def test_mirrored_images_swap_left_and_right_in_predicates():
    names = ["__background__", "left of", "on", "on the right of", "right of", "on the left of", "left"]
    assert mirrored_predicates(names) == [0, 4, 2, 5, 1, 3, 6]


def test_mirrored_images_mirror_the_centers_of_boxes():
    assert mirrored_boxes(torch.tensor([0.2, 0.3, 0.1, 0.4])).tolist() == pytest.approx([0.8, 0.3, 0.1, 0.4])


@pytest.fixture
def annotated():
    """A graph with a relation of an object with itself, and its objects and relations as SGTR trains on them."""
    graph = next(g for g in map(ScenesDataset("train").__getitem__, range(9)) if len(g.relations) > 1)
    object.__setattr__(graph, "relations", torch.cat([graph.relations, torch.tensor([[1, 1, 2]])]))
    ((objects,), (truth,)) = annotations_of(collate([graph], 20))
    return graph, objects, truth


def test_annotated_boxes_are_centered_and_relative_to_the_image(annotated):
    graph, objects, _ = annotated
    back = box_convert(objects[1], "cxcywh", "xyxy") * torch.tensor([graph.width, graph.height] * 2)
    torch.testing.assert_close(back, graph.boxes)


def test_relations_of_an_object_with_itself_are_not_annotated(annotated):
    graph, _, truth = annotated
    assert len(truth.predicates) == len(graph.relations) - 1


def test_annotated_relations_have_classes_from_0(annotated):
    graph, objects, truth = annotated
    subject, object_, predicate = graph.relations[0].tolist()
    assert truth.predicates[0] == predicate - 1
    assert truth.labels[:, 0].tolist() == [graph.labels[subject] - 1, graph.labels[object_] - 1]
    torch.testing.assert_close(truth.boxes[:, 0], objects[1][[subject, object_]])


class FewScenes(SceneGraphData):
    """The generated scenes, but at most six per part, all with relations."""

    def _read(self, split, **options):
        return [g for g in map(self._open(split).__getitem__, range(6)) if len(g.relations)]


def fit(module, ckpt_path=None):
    """Train a module for two steps and return the trainer."""
    pl.seed_everything(0)
    run = trainer_without_sanity_check(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    run.fit(module, FewScenes(None, batch_size=2, images=True), ckpt_path=ckpt_path)
    return run


@pytest.fixture(scope="module", params=["sgdet", "predcls"])
def protocol(request):
    return request.param


@pytest.fixture(scope="module")
def trained(protocol, tmp_path_factory):
    """A trained Align-SGTR, its trainer and its checkpoint."""
    module = AlignSGTRModule(protocol=protocol, aligned=["predicates", "subjects", "objects", "boxes"], **SMALL)
    run = fit(module)
    path = tmp_path_factory.mktemp("trained") / "align.ckpt"
    run.save_checkpoint(path)
    return module, run, path


@pytest.fixture(scope="module")
def data():
    return FewScenes(None, batch_size=3, images=True)


@pytest.fixture(scope="module")
def predictions(trained, data):
    """The predictions of the checkpoint, read as Align-SGTR and as SGTR."""
    *_, path = trained
    whole = load_module(path)
    assert isinstance(whole, AlignSGTRModule)
    plain = SGTRModule.load_from_checkpoint(path, map_location="cpu")
    return [sum(trainer_without_sanity_check().predict(module, data), []) for module in (whole, plain)]


def test_training_logs_the_losses_of_both_branches_and_recall(trained):
    _, run, _ = trained
    logged = set(run.callback_metrics)
    assert {"train/predicates", "train/entity classes", "train/alignment boxes", "val/R@50"} <= logged


def test_outputs_of_the_detector_that_are_not_finite_are_refused_with_their_images(trained, data):
    module, run, _ = trained
    hook = module.detector.register_forward_hook(lambda _, __, found: found._replace(logits=torch.nan * found.logits))
    with (
        hook,
        pytest.raises(ValueError, match="must be finite, got infinity or NaN in this batch of images: .*, "),
    ):
        run.validate(module, data)


def test_report_draws_the_attention_of_a_checkpoint(trained, data, tmp_path):
    *_, path = trained
    data.test[0].image().save(tmp_path / "scene.png")
    command = [str(tmp_path), "--checkpoint", str(path), "--image", str(tmp_path / "scene.png")]
    assert main(["report", *command]) == 0 and (tmp_path / "mirror_scene.png").stat().st_size > 10_000
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["stride"] = 32  # The weights of the detector overrule this option.
    torch.save(saved, tmp_path / "overruled.ckpt")
    command[2] = str(tmp_path / "overruled.ckpt")
    assert main(["report", *command]) == 0


def test_a_checkpoint_predicts_the_same_with_and_without_its_mirror(predictions):
    for one, other in zip(*predictions):
        assert torch.equal(one["triplets"], other["triplets"]) and torch.equal(one["boxes"], other["boxes"])


def test_predicted_triplets_are_sorted_by_score(predictions):
    for one in predictions[0]:
        assert one["triplets"].shape[1] == 3 and (one["triplet_scores"].diff() <= 0).all()


@pytest.mark.parametrize("protocol", ["predcls"], indirect=True)
def test_predcls_predicts_for_the_annotated_objects(predictions, data):
    graphs = {g.image_id: g for g in data.test}
    for one in predictions[0]:
        assert torch.equal(one["labels"], graphs[one["image_id"]].labels)
        torch.testing.assert_close(one["boxes"], graphs[one["image_id"]].boxes, rtol=0, atol=1e-3)


# ---- training from a trained detector


PIXELS = [torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))]


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A trained detector, its trainer and its checkpoint."""
    module = EntityDetectorModule(**SMALL_DETR)
    run = fit(module)
    path = tmp_path_factory.mktemp("detector") / "detector.ckpt"
    run.save_checkpoint(path)
    return module.eval(), run, path


@torch.no_grad()
def found_boxes(module):
    return module.detector(PIXELS).boxes


def test_the_training_of_a_detector_logs_losses_and_found_shares(detector):
    _, run, _ = detector
    assert {"train/boxes", "val/found", "val/relations_found", "val/mAP", "val/mAP_50"} <= set(run.callback_metrics)


def test_a_loaded_detector_finds_the_same_boxes(detector):
    module, _, path = detector
    torch.testing.assert_close(found_boxes(load_module(path)), found_boxes(module))


def test_a_detector_writes_as_many_detections_as_it_has_queries(detector, data, tmp_path):
    *_, path = detector
    module = load_module(path)
    trainer_without_sanity_check(callbacks=[DetectionWriter(tmp_path / "found.json")]).predict(module, data)
    found = read_detections(tmp_path / "found.json", module.object_names)
    for graph in data.test:
        boxes, labels, scores = found[graph.image_id]
        assert len(boxes) == len(labels) == len(scores) == SMALL["entity_queries"]
        assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([graph.width, graph.height])).all()


def test_a_detector_predicts_no_relations(detector, data, tmp_path):
    *_, path = detector
    with pytest.raises(ValueError, match="EntityDetectorModule predicts no relations"):
        run = trainer_without_sanity_check(callbacks=[TripletWriter(tmp_path / "none.jsonl")])
        run.predict(load_module(path), data)


def test_the_sizes_of_detector_weights_overrule_the_options_and_this_is_printed(detector, monkeypatch):
    *_, path = detector
    printed = []
    monkeypatch.setattr("sgalign.training.detr.rank_zero_info", printed.append)
    fit(SGTRModule(detector_weights=str(path), **SMALL | {"entity_queries": 5}))
    queries = SMALL["entity_queries"]
    assert printed == [f"detector_weights overrides these options: entity_queries is {queries} instead of 5"]


@pytest.fixture(scope="module")
def frozen(detector, tmp_path_factory):
    """An Align-SGTR trained with a frozen detector, its state at the start, its trainer, and its checkpoint.

    The file of the detector is deleted after the training.
    """
    folder = tmp_path_factory.mktemp("frozen")
    weights = shutil.copy(detector[2], folder / "detector.ckpt")
    module = AlignSGTRModule(detector_weights=str(weights), frozen=["detector"], **SMALL)
    started = {}
    module.on_train_start = lambda: started.update({n: p.clone() for n, p in module.state_dict().items()})
    run = fit(module)
    run.save_checkpoint(folder / "sgtr.ckpt")
    weights.unlink()
    return module, started, run, folder / "sgtr.ckpt"


def test_sgtr_starts_with_the_heads_of_its_detector(detector, frozen):
    detr, (_, started, *_) = detector[0].detector.detr, frozen
    assert all(
        torch.equal(weight, detr.class_labels_classifier.weight) for weight in started["network.entity_class.weight"]
    )
    assert all(torch.equal(bias, detr.bbox_predictor.layers[2].bias) for bias in started["network.entity_box.2.bias"])


def test_a_frozen_detector_changes_neither_weights_nor_batch_statistics(detector, frozen):
    module, started, *_ = frozen
    state = {n: t for n, t in module.state_dict().items() if n.startswith("detector.")}
    assert [name for name, tensor in state.items() if not torch.equal(tensor, started[name])] == []
    torch.testing.assert_close(found_boxes(module.eval()), found_boxes(detector[0]))


def test_a_frozen_detector_has_no_losses(frozen):
    _, _, run, _ = frozen
    assert not any(name.startswith("train/entity") for name in run.callback_metrics)


def test_a_checkpoint_of_sgtr_needs_no_file_of_its_detector(detector, frozen):
    *_, path = frozen
    torch.testing.assert_close(found_boxes(load_module(path)), found_boxes(detector[0]))


def test_weights_that_are_not_finite_are_refused_by_name(detector):
    broken = SGTRModule(detector_weights=str(detector[2]), frozen=["detector"], **SMALL)
    broken.on_train_start = lambda: torch.nn.init.constant_(broken.network.predicate.weight, torch.nan)
    with pytest.raises(ValueError, match="at step 0 these are not finite: network.predicate.weight"):
        fit(broken)


# ---- given objects


@pytest.fixture(scope="module")
def predcls():
    """An SGTR of protocol predcls, and its trainer."""
    module = SGTRModule(protocol="predcls", **SMALL)
    return module, fit(module)


def given_detections():
    """Return data with two detections per image that are annotated objects with other scores, and these detections."""
    data = FewScenes(None, batch_size=3, images=True)
    given = {g.image_id: Detections(g.boxes[:2], g.labels[:2], torch.tensor([0.5, 0.25])) for g in data.test}
    data.detections = given
    return data, given


def test_predcls_predicts_for_the_objects_of_a_file_of_detections(predcls):
    module, run = predcls
    data, given = given_detections()
    for image in sum(run.predict(module, data), []):
        boxes, labels, scores = given[image["image_id"]]
        torch.testing.assert_close(image["boxes"], boxes, rtol=0, atol=1e-3)
        assert torch.equal(image["labels"], labels) and torch.equal(image["scores"], scores)
        assert (image["triplets"][:, :2] < 2).all()


def test_sgdet_refuses_detections():
    with pytest.raises(ValueError, match="data.detections must be left out for protocol sgdet"):
        trainer_without_sanity_check().predict(SGTRModule(**SMALL), given_detections()[0])


def test_predcls_accepts_boxes_beyond_the_edge_of_the_image(predcls):
    """VRD has such boxes."""
    module, run = predcls
    data = FewScenes(None, batch_size=3, images=True)
    for graph in data.test:
        graph.boxes[0, :2] -= graph.boxes[0, :2] + 3
    run.test(module, data, verbose=False)


# ---- options, resuming and other runs


def test_instance_drop_is_refused_for_modules_that_do_not_train_on_labels_of_pairs():
    data = FewScenes(None, batch_size=2, images=True, instance_drop=1.6)
    with pytest.raises(ValueError, match="instance_drop must be 0 for SGTRModule with these options, got 1.6"):
        trainer_without_sanity_check().fit(SGTRModule(**SMALL), data)
    with pytest.raises(ValueError, match="instance_drop must be 0 for EntityDetectorModule with these"):
        trainer_without_sanity_check().fit(EntityDetectorModule(**SMALL_DETR), data)


def test_a_backbone_of_stride_16_has_no_last_stage():
    names = [n for n, _ in EntityDetector(5, backbone="resnet10", stride=16, dim=32, heads=4).named_parameters()]
    assert any("stages.2" in name for name in names) and not any("stages.3" in name for name in names)


@pytest.fixture(scope="module")
def sgtr_checkpoint(detector, tmp_path_factory):
    """The checkpoint of an SGTR that started from a detector. The file `detector.ckpt` beside it was deleted."""
    folder = tmp_path_factory.mktemp("sgtr")
    weights = shutil.copy(detector[2], folder / "detector.ckpt")
    fit(SGTRModule(detector_weights=str(weights), **SMALL)).save_checkpoint(folder / "sgtr.ckpt")
    weights.unlink()
    return folder / "sgtr.ckpt"


def test_a_new_module_without_the_weights_of_the_detector_cannot_resume(sgtr_checkpoint):
    with pytest.raises(ValueError, match="batch normalization"):
        fit(SGTRModule(**SMALL), ckpt_path=sgtr_checkpoint)


def test_a_missing_file_of_detector_weights_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="detector.ckpt"):
        fit(SGTRModule(detector_weights=str(tmp_path / "detector.ckpt"), **SMALL))


def test_the_command_line_does_not_read_detector_weights_if_it_has_a_checkpoint(sgtr_checkpoint, tmp_path, monkeypatch):
    command = ["test", "--model", "sgalign.training.SGTRModule", "--ckpt_path", str(sgtr_checkpoint)]
    for name, value in (SMALL | {"detector_weights": str(sgtr_checkpoint.parent / "detector.ckpt")}).items():
        command += [f"--model.{name}", str(value)]
    command += ["--data.images", "true", "--trainer.limit_test_batches", "1", "--trainer.logger", "false"]
    monkeypatch.chdir(tmp_path)  # Lightning writes files into the current folder.
    assert main(command) == 0


def test_options_of_the_network_must_be_those_of_the_checkpoint(sgtr_checkpoint, tmp_path, monkeypatch, capsys):
    """The weights would load, but compute something else. Other options can change."""
    monkeypatch.chdir(tmp_path)
    options = [f"--model.{name}={value}" for name, value in SMALL.items()]
    start = ["--model", "sgalign.training.SGTRModule", "--ckpt_path", str(sgtr_checkpoint), "--data.images=true"]
    for command in ("fit", "validate", "test", "predict"):
        assert main([command, *start, *options, "--model.heads=2"]) == 1
        assert "heads must be 4, as in the checkpoint, got 2" in capsys.readouterr().err
    module = SGTRModule.load_from_checkpoint(sgtr_checkpoint, dropout=0.3)
    assert module.detector.detr.model.encoder.layers[0].dropout == 0.3
    assert {part.p for part in module.network.modules() if isinstance(part, torch.nn.Dropout)} <= {0.3}


def test_detector_weights_of_another_module_are_refused(tmp_path):
    saved = {"module": "MotifsModule", "object_names": [], "predicate_names": [], "run_seed": 0, "random_states": []}
    torch.save({"sgalign": saved, "state_dict": {}, "hyper_parameters": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="EntityDetectorModule"):
        fit(SGTRModule(detector_weights=str(tmp_path / "other.ckpt"), **SMALL))


def test_found_shares_count_objects_and_the_relations_between_them():
    """Only the first half of the objects have detections of their class."""
    graph = next(g for g in map(ScenesDataset("test").__getitem__, range(9)) if len(g.relations) > 2)
    batch = collate([graph], 20)
    ((labels, boxes),), _ = annotations_of(batch)
    half = len(labels) // 2
    logits = functional.one_hot(labels - 1, 17).float()[None, None] * 9
    logits[..., half:, :] = logits[..., half:, :].roll(1, -1)  # a wrong class
    found = DetectedEntities(*(torch.zeros(1),) * 4, logits, boxes[None, None] * torch.tensor([1, 1, 1.1, 1.1]))
    module, logged = SGTRModule(**SMALL), {}
    module.log = lambda name, value, **options: logged.update({name: float(value)})
    module._trainer = type("Trainer", (), {"testing": False, "world_size": 1})()
    module.log_found(found, batch)
    assert logged["val/found"] == pytest.approx(half / len(labels))
    both = (graph.relations[:, :2] < half).all(1).float().mean().item()
    assert logged["val/relations_found"] == pytest.approx(both)


@pytest.mark.parametrize("aligned", [["predicates"], ["subjects"], ["boxes"]])
def test_every_trained_weight_gets_a_gradient(aligned):
    """DDP would wait for a gradient that is missing."""
    module = AlignSGTRModule(aligned=aligned, **SMALL)
    idle = []
    module.on_after_backward = lambda: idle.extend(
        name for name, p in module.named_parameters() if p.requires_grad and p.grad is None
    )
    fit(module)
    assert idle == []


@pytest.mark.parametrize("focal", [True, False])
def test_tied_heads_without_a_mask_leave_nothing_to_align(focal):
    """Predicates are independent of each other (focal) or exclusive. The branches always share their box heads."""
    aligned = ["predicates", "subjects", "objects", "boxes"]
    for tied in (True, False):
        options = SMALL | {"mask_ratio": 0.0, "dropout": 0.0, "aligned": aligned, "focal": focal, "tied_heads": tied}
        metrics = fit(AlignSGTRModule(**options)).callback_metrics
        assert all((metrics[f"train/alignment {part}"] < 1e-5) == (tied or part == "boxes") for part in aligned)


def test_runs_with_the_same_seed_are_equal():
    states = []
    for _ in range(2):
        pl.seed_everything(1)
        module = AlignSGTRModule(**SMALL)
        fit(module)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_frozen_parts_need_weights_of_a_detector():
    with pytest.raises(ValueError, match="detector_weights"):
        fit(SGTRModule(frozen=["backbone"], **SMALL))


def test_frozen_parts_do_not_change(tmp_path):
    pl.seed_everything(0)
    fit(SGTRModule(**SMALL)).save_checkpoint(tmp_path / "whole.ckpt")
    frozen = "backbone", "encoder", "decoder"
    module = SGTRModule.load_from_checkpoint(tmp_path / "whole.ckpt", frozen=frozen)
    before = {}
    module.on_train_start = lambda: before.update({n: p.clone() for n, p in module.state_dict().items()})
    fit(module)
    changed = {name for name, p in module.state_dict().items() if not torch.equal(p, before[name])}
    assert not [name for name in changed if name.startswith(tuple(f"detector.detr.model.{part}" for part in frozen))]
    assert "detector.detr.class_labels_classifier.weight" in changed and "network.vector.weight" in changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "sgcls"}, "protocol"),
        ({"frozen": ["head"]}, "frozen"),
        ({"short_sides": []}, "short_sides"),
        ({"short_sides": [600], "long_side": 500}, "short_sides"),
        ({"flip": 2}, "flip"),
        ({"pairs": 0}, "pairs"),
        ({"queries": 0}, "queries"),
        ({"layers": 0}, "layers"),
        ({"encoder_layers": -1}, "encoder_layers"),
        ({"entity_queries": 0}, "entity_queries"),
        ({"dim": 250}, "dim"),
        ({"heads": 7}, "heads"),
        ({"dropout": 1}, "dropout"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"backbone_learning_rate": math.nan}, "backbone_learning_rate"),
        ({"entity_loss_weights": [1, 5]}, "entity_loss_weights"),
        ({"mask_ratio": -1}, "mask_ratio"),
        ({"aligned": []}, "aligned"),
        ({"aligned": ["vectors"]}, "aligned"),
        ({"alignment_weight": math.nan}, "alignment_weight"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        AlignSGTRModule(**options)


KINDS = {"detr": EntityDetectorModule, "sgtr": SGTRModule, "align_sgtr": AlignSGTRModule}


def config_of_model(name):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]


@pytest.mark.parametrize("suffix", ["", "_small"])
@pytest.mark.parametrize("name", KINDS)
def test_configs_make_their_modules(name, suffix):
    config = config_of_model(name + suffix)
    assert config["class_path"] == f"sgalign.training.{KINDS[name].__name__}"
    KINDS[name](**config["init_args"])


@pytest.mark.parametrize("name", KINDS)
def test_configs_have_the_published_sizes(name):
    options = config_of_model(name)["init_args"]
    sizes = {"dim": 256, "heads": 8, "ffn_dim": 2048, "entity_layers": 6, "entity_queries": 100}
    if name != "detr":
        sizes |= {"layers": 6, "encoder_layers": 3, "queries": 180}
    assert {key: options[key] for key in sizes} == sizes


# ---- published weights


def published_state(dim, ffn_dim, layers, encoder_layers):
    """Return random weights with the names and shapes of the public code's checkpoints. Query positions are zero."""
    nn, state = torch.nn, {}

    def add(prefix, module):
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                state[prefix + name] = (
                    torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) * 0.2
                )

    def transformer_layers(prefix, kind, count):
        for number in range(count):
            add(f"{prefix}{number}.", kind(dim, 8, ffn_dim))

    for part, kind in (("encoder", nn.TransformerEncoderLayer), ("decoder", nn.TransformerDecoderLayer)):
        transformer_layers(f"transformer.{part}.layers.", kind, 2)
    transformer_layers("relation_decoder.encoder.layers.", nn.TransformerEncoderLayer, encoder_layers)
    decoder = "relation_decoder."
    for name in ("predicate_decoder.layers.", "rel_ent_crs_decoder_layers_sub.", "rel_ent_crs_decoder_layers_obj."):
        transformer_layers(decoder + name, nn.TransformerDecoderLayer, layers)
    transformer_layers(f"{decoder}rel_q_gen.layers.", nn.TransformerDecoderLayer, 1)
    norms = "encoder.norm", "rel_q_gen.norm", "rel_decoder_norm", "rel_ent_crs_decoder_norm"
    for name in ("transformer.decoder.norm", *(decoder + norm for norm in norms)):
        add(f"{name}.", nn.LayerNorm(dim))
    for name, width in (
        (f"{decoder}ent_pos_sine_proj", dim), (f"{decoder}split_query.1", 3 * dim), ("rel_class_embed", PREDICATES),
        (f"{decoder}ent_rel_fuse_fc_sub.0", dim), (f"{decoder}ent_rel_fuse_fc_obj.0", dim), ("rel_vector_embed", 4),
        ("class_embed", OBJECTS + 1), ("sub_class_embed.0", OBJECTS + 1), ("obj_class_embed.0", OBJECTS + 1),
    ):  # fmt: skip
        add(f"{name}.", nn.Linear(dim, width))
    for name in ("bbox_embed", "sub_bbox_embed.0", "obj_bbox_embed.0"):
        for number, width in enumerate((dim, dim, 4)):
            add(f"{name}.layers.{number}.", nn.Linear(dim, width))
    for end in ("", "_sub", "_obj"):
        state[f"{decoder}rel_query_embed{end}.weight"] = torch.zeros(QUERIES, dim)
    state["query_embed.weight"] = torch.randn(6, dim)
    add("input_proj.", nn.Conv2d(64, dim, 1))

    def convolution(prefix, inputs, width, size):
        add(f"{prefix}.", nn.Conv2d(inputs, width, size, bias=False))
        add(f"{prefix}.norm.", nn.BatchNorm2d(width))

    convolution("backbone.stem.conv1", 3, 8, 7)
    inputs = 8
    for stage, width in enumerate((16, 24, 32, 64)):
        prefix = f"backbone.res{stage + 2}.0"
        convolution(f"{prefix}.shortcut", inputs, width, 1)
        for number, shape in enumerate(((inputs, width // 4, 1), (width // 4, width // 4, 3), (width // 4, width, 1))):
            convolution(f"{prefix}.conv{number + 1}", *shape)
        inputs = width
    return state


def test_published_weights_give_the_outputs_of_torchs_own_layers(tmp_path):
    """The public names of the weights are those of torch's layers."""
    dim, ffn_dim, layers, encoder_layers = 16, 24, 2, 2
    state = published_state(dim, ffn_dim, layers, encoder_layers)
    torch.save({"model": state}, tmp_path / "sgtr.pth")
    detector, net = load_published(tmp_path / "sgtr.pth")
    assert (net.layers, net.num_objects, net.num_predicates) == (layers, OBJECTS, PREDICATES)
    detector.eval(), net.eval()
    found = entities()
    found = DetectedEntities(*(t if t.dtype == torch.bool else t.float() for t in found))
    found = found._replace(position=torch.zeros_like(found.position))  # torch's layers have no positions

    def layer(kind, prefix, number, **options):
        module = kind(dim, 8, ffn_dim, batch_first=True, norm_first=True, **options).eval()
        start = f"{prefix}{number}."
        module.load_state_dict({n[len(start) :]: t for n, t in state.items() if n.startswith(start)})
        return module

    def norm(name, x):
        return functional.layer_norm(x, (dim,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    decoder, nn = "relation_decoder.", torch.nn
    memory = found.memory
    for number in range(encoder_layers):
        memory = layer(nn.TransformerEncoderLayer, f"{decoder}encoder.layers.", number)(
            memory, src_key_padding_mask=found.padding
        )
    memory = norm(f"{decoder}encoder.norm", memory)
    middles = linear(f"{decoder}ent_pos_sine_proj", sine_embedding(found.boxes[-1][..., :2], dim))
    generate = layer(nn.TransformerDecoderLayer, f"{decoder}rel_q_gen.layers.", 0)
    queries = generate(torch.zeros(2, QUERIES, dim), found.features + middles)
    queries = linear(f"{decoder}split_query.1", norm(f"{decoder}rel_q_gen.norm", queries).relu())
    subject, object_, predicate = queries.split(dim, -1)
    for number in range(layers):
        read = [
            layer(nn.TransformerDecoderLayer, decoder + name, number)
            for name in (
                "predicate_decoder.layers.",
                "rel_ent_crs_decoder_layers_sub.",
                "rel_ent_crs_decoder_layers_obj.",
            )
        ]
        predicate = read[0](predicate, memory, memory_key_padding_mask=found.padding)
        predicate = norm(f"{decoder}rel_decoder_norm", predicate)
        subject, object_ = (
            norm(f"{decoder}rel_ent_crs_decoder_norm", role(x, found.features))
            for role, x in zip(read[1:], (subject, object_))
        )
        fused = linear(f"{decoder}ent_rel_fuse_fc_sub.0", subject) + linear(f"{decoder}ent_rel_fuse_fc_obj.0", object_)
        predicate = predicate + fused.relu()
    predicted = net(found).at(-1)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(predicted.logits, linear("rel_class_embed", predicate), **close)
    torch.testing.assert_close(predicted.vectors, linear("rel_vector_embed", predicate).sigmoid(), **close)
    for role, (name, x) in enumerate((("sub", subject), ("obj", object_))):
        torch.testing.assert_close(predicted.class_logits[role], linear(f"{name}_class_embed.0", x), **close)
        for number in range(3):
            x = linear(f"{name}_bbox_embed.0.layers.{number}", x.relu() if number else x)
        torch.testing.assert_close(predicted.boxes[role], x.sigmoid(), **close)


def test_the_first_published_layer_is_converted_to_normalized_rgb(tmp_path):
    """The public layer reads BGR in 0 to 255 minus its mean. Ours has the same output for normalized RGB."""
    state = published_state(16, 24, 1, 1)
    torch.save(state, tmp_path / "sgtr.pth")
    detector, _ = load_published(tmp_path / "sgtr.pth")
    pixels = torch.rand(3, 20, 20)
    ours = detector.detr.model.backbone.model.embedder.embedder.convolution(detector.batch([pixels])[0])
    bgr = 255 * pixels.flip(0) - torch.tensor([103.53, 116.28, 123.675])[:, None, None]
    expected = functional.conv2d(bgr[None], state["backbone.stem.conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-2)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="class_embed"):
        load_published(tmp_path / "other.pth")


def test_a_missing_checkpoint_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_published(tmp_path / "nothing.pth")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("text")
    with pytest.raises(ValueError, match="text.pth: must be a checkpoint"):
        load_published(tmp_path / "text.pth")


def test_a_published_checkpoint_with_another_shape_is_refused(tmp_path):
    state = published_state(16, 24, 1, 1)
    state["transformer.encoder.layers.0.linear1.weight"] = torch.ones(3)
    torch.save(state, tmp_path / "sgtr.pth")
    with pytest.raises(
        ValueError, match="sgtr.pth: must be a checkpoint of SGTR's public code, but its tensors do not"
    ):
        load_published(tmp_path / "sgtr.pth")
