"""Tests of the evaluators against an oracle of plain loops, and of each rule with small examples."""

import json
import math

import evaluation_oracle
import pytest
import sgbench_oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchmetrics")
from sgalign.data import SceneGraph  # noqa: E402
from sgalign.data.class_names import BACKGROUND  # noqa: E402
from sgalign.matching import find_objects  # noqa: E402
from sgalign.metrics import (  # noqa: E402
    OpenImagesEvaluator,
    SceneGraphEvaluator,
    SGBenchEvaluator,
    VRDEvaluator,
    predicate_groups,
    zero_shot_triplets,
)
from sgalign.metrics.open_images import average_precision  # noqa: E402

PREDICATES = 3
NAMES = ["__background__", "on", "near", "has"]
TOP_K = (1, 2, 5)


def evaluate(predictions, targets, top_k=TOP_K, num_predicates=PREDICATES, predicate_names=NAMES, protocol="sgdet"):
    metric = SceneGraphEvaluator(protocol, num_predicates, top_k=top_k, predicate_names=predicate_names)
    metric.update(predictions, targets)
    return {name: value.item() for name, value in metric.compute().items()}


# ---- images drawn by hypothesis. Coarse boxes, few classes and coarse scores make ties and borderline IoUs common


@st.composite
def objects(draw, at_least=0):
    boxes = draw(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=at_least, max_size=5))
    boxes = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    labels = draw(st.lists(st.integers(1, 2), min_size=len(boxes), max_size=len(boxes)))
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)


def rows(draw, width, element, size):
    return draw(st.lists(st.tuples(*[element] * width), min_size=0, max_size=size))


@st.composite
def images(draw):
    boxes, labels = draw(objects())
    count = len(labels)
    relations = []
    if count:
        index = st.integers(0, count - 1)
        relations = draw(st.lists(st.tuples(index, index, st.integers(1, PREDICATES)), max_size=6))
    target = {
        "boxes": boxes,
        "labels": labels,
        "relations": torch.tensor(relations, dtype=torch.int64).reshape(-1, 3),
    }
    if draw(st.booleans()):
        boxes, labels = draw(objects())
    count = len(labels)
    pairs = rows(draw, 2, st.integers(0, count - 1), 8) if count else []
    coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    scores = draw(st.lists(coarse, min_size=count, max_size=count))
    predicate_scores = [draw(st.tuples(*[coarse] * (PREDICATES + 1))) for _ in pairs]
    prediction = {
        "boxes": boxes,
        "labels": labels,
        "scores": torch.tensor(scores),
        "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        "predicate_scores": torch.tensor(predicate_scores).reshape(-1, PREDICATES + 1),
    }
    return prediction, target


batches = st.lists(images(), max_size=4)


def split(batch):
    return [p for p, _ in batch], [t for _, t in batch]


def arrays(fields):
    return {name: value.numpy() for name, value in fields.items()}


def as_triplets(prediction):
    """Return the prediction as a given ranking, with one predicate per pair and in an order that no rule would give."""
    triplets = torch.cat((prediction["pairs"], torch.arange(len(prediction["pairs"]))[:, None] % PREDICATES + 1), 1)
    fields = {name: prediction[name] for name in ("boxes", "labels")}
    return fields | {"triplets": triplets, "triplet_scores": prediction["predicate_scores"][:, 1]}


ZERO_SHOT = torch.tensor([[1, 1, 2], [2, 3, 1], [2, 2, 2]])
GROUPS = {"head": [2], "tail": [3, 1]}


@settings(max_examples=300, deadline=None)
@given(batches, st.sampled_from(["sgdet", "phrdet"]), st.sampled_from(["zero", "skip"]), *[st.booleans()] * 3)
def test_recall_agrees_with_the_oracle(batch, protocol, missing, plus_one, ranked, strict):
    if ranked:
        batch = [(as_triplets(prediction), target) for prediction, target in batch]
    metric = SceneGraphEvaluator(
        protocol,
        PREDICATES,
        top_k=TOP_K,
        zero_shot=ZERO_SHOT,
        groups=GROUPS,
        predicate_names=[BACKGROUND, "1", "2", "3"],
        missing=missing,
        plus_one=plus_one,
        strict_constraint=strict,
    )
    metric.update(*split(batch))
    expected = evaluation_oracle.evaluate(
        [(arrays(prediction), arrays(target)) for prediction, target in batch],
        PREDICATES,
        protocol=protocol,
        top_k=TOP_K,
        zero_shot=ZERO_SHOT.numpy(),
        groups=GROUPS,
        missing=missing,
        iou_convention=float(plus_one),
        strict_constraint=strict,
    )
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(batches, st.booleans(), st.booleans())
def test_recall_of_given_objects_agrees_with_the_oracle(batch, ranked, strict):
    """PredCls identifies the objects of a pair by their indices."""
    given = []
    for prediction, target in batch:
        inside = (prediction["pairs"] < len(target["labels"])).all(1)
        objects = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
        rows = {name: prediction[name][inside] for name in ("pairs", "predicate_scores")}
        rows = objects | rows
        given.append((as_triplets(rows) if ranked else rows, target))
    metric = SceneGraphEvaluator("predcls", PREDICATES, top_k=TOP_K, strict_constraint=strict)
    metric.update(*split(given))
    expected = evaluation_oracle.evaluate(
        [(arrays(prediction), arrays(target)) for prediction, target in given],
        PREDICATES,
        protocol="predcls",
        top_k=TOP_K,
        strict_constraint=strict,
    )
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx({name: expected[name] for name in result}, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(batches, st.sampled_from(["relationship", "phrase"]), st.sampled_from([1, 2, 3]))
def test_vrd_recall_agrees_with_the_oracle(batch, task, predicates_per_pair):
    options = {"top_k": TOP_K, "predicates_per_pair": predicates_per_pair}
    metric = VRDEvaluator(task, PREDICATES, zero_shot=ZERO_SHOT, **options)
    metric.update(*split(batch))
    expected = evaluation_oracle.vrd(
        [(arrays(prediction), arrays(target)) for prediction, target in batch],
        PREDICATES,
        zero_shot=ZERO_SHOT.numpy(),
        phrase=task == "phrase",
        **options,
    )
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(batches)
def test_open_images_score_agrees_with_the_oracle(batch):
    metric = OpenImagesEvaluator(PREDICATES)
    metric.update(*split(batch))
    expected = evaluation_oracle.open_images(
        [(arrays(prediction), arrays(target)) for prediction, target in batch], PREDICATES
    )
    result = {name: value.item() for name, value in metric.compute().items()}
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(batches, st.booleans())
def test_sgbench_agrees_with_the_oracle(batch, ranked):
    if ranked:
        batch = [(as_triplets(prediction), target) for prediction, target in batch]
    metric = SGBenchEvaluator(PREDICATES, top_k=TOP_K)
    metric.update(*split(batch))
    expected = sgbench_oracle.evaluate([(arrays(p), arrays(t)) for p, t in batch], PREDICATES, TOP_K)
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(batches, batches)
def test_merged_and_streamed_states_equal_one_update(first, second):
    whole = evaluate(*split(first + second))
    streamed, merged, other = (
        SceneGraphEvaluator("sgdet", PREDICATES, top_k=TOP_K, predicate_names=NAMES) for _ in range(3)
    )
    for prediction, target in first + second:
        streamed.update([prediction], [target])
    merged.update(*split(first))
    other.update(*split(second))
    merged.compute()
    merged.merge_state(other)
    for metric in (streamed, merged):
        assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(whole, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(images(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_the_order_of_images_objects_and_relations_does_not_matter(batch, random):
    """Only the order of `pairs` matters, because it decides between equal scores. The test does not change it."""

    def shuffled(count):
        return torch.tensor(random.sample(range(count), count), dtype=torch.int64)

    moved = []
    for prediction, target in batch:
        order, true_order = shuffled(len(prediction["labels"])), shuffled(len(target["labels"]))
        relations = target["relations"][shuffled(len(target["relations"]))].clone()
        relations[:, :2] = true_order.argsort()[relations[:, :2]]
        moved.append(
            (
                prediction
                | {name: prediction[name][order] for name in ("boxes", "labels", "scores")}
                | {"pairs": order.argsort()[prediction["pairs"]]},
                {
                    "boxes": target["boxes"][true_order],
                    "labels": target["labels"][true_order],
                    "relations": relations,
                },
            )
        )
    random.shuffle(moved)
    assert evaluate(*split(moved)) == pytest.approx(evaluate(*split(batch)), abs=1e-12)


# ---- single rules


def objects_at(*boxes, labels=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor(labels or range(1, len(boxes) + 1)),
    }


TWO = objects_at((0, 0, 9, 9), (20, 0, 29, 9))


def predict(pairs, predicate_scores, scores=None, of=TWO):
    return of | {
        "scores": torch.ones(len(of["labels"])) if scores is None else torch.tensor(scores),
        "pairs": torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        "predicate_scores": torch.tensor(predicate_scores).reshape(-1, PREDICATES + 1),
    }


def truth(*relations, of=TWO):
    return of | {"relations": torch.tensor(relations, dtype=torch.int64).reshape(-1, 3)}


def test_a_pair_predicts_its_best_predicate_other_than_the_background():
    prediction = predict([(0, 1)], [0.9, 0.02, 0.05, 0.03])
    result = evaluate([prediction], [truth((0, 1, 2), (0, 1, 3))])
    assert result["R@5"] == 0.5 and result["R@5/near"] == 1 and result["R@5/has"] == 0


def test_ties_between_predicates_go_to_the_lower_number():
    prediction = predict([(0, 1)], [0.0, 0.1, 0.4, 0.4])
    assert evaluate([prediction], [truth((0, 1, 2))])["R@1"] == 1
    assert evaluate([prediction], [truth((0, 1, 3))])["R@1"] == 0


def test_ties_between_triplets_go_to_the_earlier_pair():
    # An unstable sort may keep the order of a few triplets by chance, so there are many.
    pairs = [(0, 1)] * 40 + [(1, 0)] + [(0, 1)] * 100
    result = evaluate([predict(pairs, [[0.0, 0.0, 0.5, 0.5]] * 141)], [truth((1, 0, 2))], top_k=(40, 41))
    assert result["R@40"] == 0 and result["R@41"] == 1


def test_a_score_is_the_product_of_subject_object_and_predicate_score():
    three = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9))
    prediction = predict([(0, 1), (0, 2)], [[0, 0.9, 0, 0], [0, 0.5, 0, 0]], scores=[1.0, 0.5, 1.0], of=three)
    result = evaluate([prediction], [truth((0, 2, 1), of=three)])
    assert result["R@1"] == 1


def test_scores_are_multiplied_in_float64():
    # In float32 both products are 1 - 2^-23. Without rounding, the second one is larger by 2^-48.
    below = 1 - 2**-24
    assert torch.tensor(below) * torch.tensor(below) == torch.tensor(1 - 2**-23)
    three = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9))
    prediction = predict([(1, 0), (1, 2)], [[0, 1 - 2**-23, 0, 0], [0, below, 0, 0]], [1.0, 1.0, below], of=three)
    assert evaluate([prediction], [truth((1, 2, 1), of=three)])["R@1"] == 1


def test_scores_of_subject_and_object_are_multiplied_in_float64():
    # The same two products, now of the objects' scores.
    four = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9), (60, 0, 69, 9))
    scores = [1 - 2**-24, 1 - 2**-24, 1 - 2**-23, 1.0]
    prediction = predict([(2, 3), (0, 1)], [[0.0, 1, 0, 0], [0, 1, 0, 0]], scores, of=four)
    assert evaluate([prediction], [truth((0, 1, 1), of=four)])["R@1"] == 1


@pytest.mark.parametrize("other, finds", [((0, 0, 9, 4), True), ((0, 0, 9, 3), False), ((0, 0, 9, 3.99), False)])
def test_an_iou_of_one_half_is_enough_if_boxes_include_their_last_pixels(other, finds):
    """Boxes of 10 x 10 and 10 x 5 pixels have an IoU of 1 / 2. Without the added pixel it would be 4 / 9."""
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=objects_at(other, (20, 0, 29, 9)))
    assert evaluate([prediction], [truth((0, 1, 1))])["R@1"] == finds
    assert evaluate([predict([(1, 0)], [0.0, 1, 0, 0], of=prediction)], [truth((1, 0, 1))])["R@1"] == finds


def test_the_classes_of_subject_and_object_must_be_right():
    for labels in ([1, 1], [2, 2]):
        prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=TWO | {"labels": torch.tensor(labels)})
        assert evaluate([prediction], [truth((0, 1, 1))])["R@1"] == 0


def test_a_triplet_finds_several_relations_and_a_relation_counts_once():
    doubled = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (0, 0, 9, 8), labels=[1, 2, 1])
    prediction = predict([(0, 1), (0, 1)], [[0.0, 1, 0, 0]] * 2)
    result = evaluate([prediction], [truth((0, 1, 1), (2, 1, 1), (0, 1, 1), (0, 1, 2), of=doubled)])
    assert result["R@1"] == 0.75 and result["R@2"] == 0.75 and result["R@2/on"] == 1


def test_a_relation_of_an_object_with_itself_counts():
    assert evaluate([predict([(0, 0)], [0.0, 1, 0, 0])], [truth((0, 0, 1))])["R@1"] == 1
    assert evaluate([predict([(0, 1)], [0.0, 1, 0, 0])], [truth((0, 0, 1))])["R@1"] == 0


def test_recall_is_averaged_over_images_and_mean_recall_also_over_predicates():
    """The first image has 1 `on`, which is found. The second has 1 of 3 `on` and 0 of 1 `near`. No image has `has`."""
    boxes = objects_at(*((20 * i, 0, 20 * i + 9, 9) for i in range(4)))
    first = predict([(0, 1)], [0.0, 1, 0, 0], of=boxes), truth((0, 1, 1), of=boxes)
    second = first[0], truth((0, 1, 1), (0, 2, 1), (0, 3, 1), (2, 3, 2), of=boxes)
    result = evaluate([first[0], second[0]], [first[1], second[1]])
    assert result["R@5"] == pytest.approx((1 + 1 / 4) / 2)
    assert result["mR@5"] == pytest.approx(((1 + 1 / 3) / 2 + 0 + 0) / 3)
    assert result["mR_pooled@5"] == pytest.approx((2 / 4 + 0 + 0) / 3)


FOUND = predict([(0, 1)], [0.0, 1, 0, 0]), truth((0, 1, 1))


def test_images_without_relations_do_not_count():
    assert evaluate([FOUND[0]] * 2, [FOUND[1], truth()])["R@1"] == 1


def test_images_without_predicted_pairs_count_0():
    nothing = predict([], []) | {name: FOUND[0][name][:0] for name in ("boxes", "labels", "scores")}
    for empty in (predict([], []), nothing):
        assert evaluate([FOUND[0], empty], [FOUND[1]] * 2)["R@1"] == 0.5


def test_without_images_every_metric_is_0():
    assert set(evaluate([], []).values()) == {0.0}


def test_the_state_has_a_fixed_size_and_float64():
    metric = SceneGraphEvaluator("predcls", PREDICATES)
    before = {name: value.shape for name, value in metric.metric_state.items()}
    metric.update([FOUND[0]], [FOUND[1]])
    assert {name: value.shape for name, value in metric.metric_state.items()} == before
    assert all(value.dtype == torch.float64 for value in metric.metric_state.values())


def test_without_predicate_names_there_are_no_metrics_of_single_predicates():
    metric = SceneGraphEvaluator("predcls", PREDICATES)
    metric.update([FOUND[0]], [FOUND[1]])
    names = "R", "ngR", "mR", "ng-mR", "mR_pooled", "F", "A"
    assert set(metric.compute()) == {f"{name}@{k}" for name in names for k in (20, 50, 100)}


def test_reset_forgets_the_images():
    metric = SceneGraphEvaluator("predcls", PREDICATES)
    metric.update([FOUND[0]], [FOUND[1]])
    metric.reset()
    assert metric.compute()["R@20"] == 0


# ---- predicted labels and boxes


@pytest.mark.parametrize("labels, recall", [([1, 2], 1), ([1, 1], 0), ([2, 1], 0), ([3, 2], 0)])
def test_in_sgcls_a_wrong_label_misses_every_relation_of_the_object(labels, recall):
    prediction = predict([(0, 1), (1, 0)], [[0.0, 1, 0, 0]] * 2, [0.9, 0.8], of=TWO | {"labels": torch.tensor(labels)})
    assert evaluate([prediction], [truth((0, 1, 1), (1, 0, 1))], protocol="sgcls")["R@2"] == recall


def test_in_sgcls_label_scores_can_outweigh_predicate_scores():
    three = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9))
    prediction = predict([(0, 1), (0, 2)], [[0.1, 0.9, 0, 0], [0.4, 0.6, 0, 0]], [0.9, 0.5, 0.9], of=three)
    assert evaluate([prediction], [truth((0, 2, 1), of=three)], protocol="sgcls")["R@1"] == 1
    assert evaluate([prediction], [truth((0, 1, 1), of=three)], protocol="sgcls")["R@1"] == 0


@pytest.mark.parametrize("end", ["subject", "object"])
@pytest.mark.parametrize("bottom, finds", [(4, True), (3, False)])
def test_both_detected_boxes_must_overlap_by_one_half(end, bottom, finds):
    """A box of the first 5 of 10 rows of pixels has an IoU of exactly one half, which is enough. 4 rows are not."""
    boxes = {"subject": (0, 0, 9, 9), "object": (20, 0, 29, 9)}
    boxes[end] = (boxes[end][0], 0, boxes[end][2], bottom)
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=objects_at(*boxes.values()))
    assert evaluate([prediction], [truth((0, 1, 1))], protocol="sgdet")["R@1"] == finds


def test_in_sgdet_a_second_detection_finds_no_relation_twice_but_takes_a_rank():
    """Two detections of the same object find the same relation."""
    boxes = (0, 0, 9, 9), (1, 0, 9, 9), (0, 0, 9, 8), (20, 0, 29, 9), (60, 0, 69, 9)
    found = objects_at(*boxes, labels=[3, 1, 1, 2, 2])
    pairs = [(0, 3), (1, 3), (2, 3), (1, 4)]
    prediction = predict(pairs, [[0.0, 1, 0, 0]] * 4, [0.9, 0.8, 0.7, 0.9, 0.3], of=found)
    target = truth((0, 1, 1), (0, 2, 1), of=objects_at((0, 0, 9, 9), (20, 0, 29, 9), (60, 0, 69, 9), labels=[1, 2, 2]))
    result = evaluate([prediction], [target], top_k=(1, 2, 3, 4), protocol="sgdet")
    # The triplets, in this order, have a wrong label, find the first relation, find it again, find the second one.
    assert [result[f"R@{k}"] for k in (1, 2, 3, 4)] == [0, 0.5, 0.5, 1]
    assert result["mR_pooled@3"] == pytest.approx(0.5 / PREDICATES)


def test_in_sgdet_one_detection_can_find_two_objects():
    """Two annotated objects of a class overlap so much that one box finds both."""
    doubled = objects_at((0, 0, 9, 9), (0, 0, 9, 7), (20, 0, 29, 9), labels=[1, 1, 2])
    prediction = predict([(0, 1)], [0.0, 0, 0, 1], of=objects_at((0, 0, 9, 8), (20, 0, 29, 9)))
    target = truth((0, 2, 3), (1, 2, 3), (1, 2, 1), of=doubled)
    assert evaluate([prediction], [target], protocol="sgdet")["R@1"] == pytest.approx(2 / 3)


def test_in_sgdet_an_image_without_detections_counts_0():
    nothing = predict([], []) | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
    assert evaluate([nothing, FOUND[0]], [FOUND[1]] * 2, protocol="sgdet")["R@1"] == 0.5


# ---- other metrics and options


def test_without_the_graph_constraint_a_pair_predicts_several_predicates():
    prediction = predict([(0, 1), (1, 0)], [[0.9, 0.02, 0.05, 0.03], [0.0, 0.04, 0, 0]])
    result = evaluate([prediction], [truth((0, 1, 3), (0, 1, 2), (1, 0, 1))])
    assert result["R@2"] == pytest.approx(2 / 3)  # scores 0.05 and 0.04
    assert result["ngR@2"] == pytest.approx(2 / 3) and result["ngR@5"] == 1  # scores 0.05, 0.04 and 0.03
    assert result["ng-mR@2"] == pytest.approx(2 / 3)


def test_without_the_graph_constraint_ties_go_to_the_earlier_pair_then_the_lower_predicate():
    prediction = predict([(1, 0), (0, 1)], [[0.0, 0.5, 0.5, 0.5]] * 2)
    for k, relation in enumerate([(1, 0, 1), (1, 0, 2), (1, 0, 3), (0, 1, 1)], 1):
        result = evaluate([prediction], [truth(relation)], top_k=tuple(range(1, 6)))
        assert [result[f"ngR@{i}"] for i in range(1, 6)] == [float(i >= k) for i in range(1, 6)]


def test_zero_shot_recall_counts_only_unseen_triplets_and_images_that_have_some():
    zero_shot = torch.tensor([[1, 2, 2]])  # class 1, "near", class 2
    metric = SceneGraphEvaluator("sgdet", PREDICATES, top_k=(1, 2), zero_shot=zero_shot)
    good = predict([(0, 1), (1, 0)], [[0.0, 0, 0.4, 0], [0.0, 0.9, 0, 0]])
    metric.update([good] * 3, [truth((0, 1, 2), (1, 0, 1)), truth((1, 0, 1)), truth((0, 1, 2), (0, 1, 2), (0, 1, 3))])
    result = metric.compute()
    assert metric.zero_shot_images == 2
    assert result["zR@1"] == 0 and result["zR@2"] == 1 and result["ng-zR@2"] == 1


def test_zero_shot_triplets_occur_in_test_graphs_but_not_in_training_graphs():
    def graph(*relations):
        return SceneGraph("a", 10, 10, torch.zeros(2, 4), torch.tensor([1, 2]), torch.tensor(relations).reshape(-1, 3))

    unseen = zero_shot_triplets([graph((0, 1, 1))], [graph((0, 1, 1), (1, 0, 1), (1, 0, 1), (0, 1, 3))])
    assert unseen.tolist() == [[1, 3, 2], [2, 1, 1]]


def test_no_graphs_have_no_zero_shot_triplets():
    assert zero_shot_triplets([], []).shape == (0, 3)


@pytest.fixture
def grouped():
    """The metrics of predictions that find `on`, 1 of 2 `near` and no `has`, which is alone in its group."""
    boxes = objects_at(*((20 * i, 0, 20 * i + 9, 9) for i in range(4)))
    prediction = predict([(0, 1), (1, 2)], [[0.0, 1, 0, 0], [0.0, 0, 1, 0]], of=boxes)
    metric = SceneGraphEvaluator("sgdet", PREDICATES, top_k=(5,), groups={"common": [1, 2], "rare": [3]})
    metric.update([prediction], [truth((0, 1, 1), (1, 2, 2), (2, 3, 2), (0, 2, 3), of=boxes)])
    return metric.compute()


def test_the_recall_of_a_group_is_the_mean_over_its_predicates(grouped):
    assert grouped["mR@5/common"] == 0.75 and grouped["mR@5/rare"] == 0


def test_f_is_the_harmonic_mean_of_recall_and_mean_recall(grouped):
    """Both are 1 / 2 here."""
    assert grouped["F@5"] == pytest.approx(0.5)


def test_predicates_are_grouped_into_head_body_and_tail_by_frequency():
    names = [BACKGROUND, *"abcdefghij"]
    groups = predicate_groups(names, torch.tensor([1, 9, 1, 8, 7, 7, 2, 3, 4, 5]))
    assert groups == {"head": [2], "body": [4, 5, 6, 10, 9], "tail": [8, 7, 1, 3]}


def test_a_single_predicate_belongs_to_the_body():
    assert predicate_groups([BACKGROUND, "on"], torch.tensor([3])) == {"body": [1]}


def test_vg150_groups_are_the_published_ones(vg_root):
    names = json.loads((vg_root / "VG-SGG-dicts-with-attri.json").read_text())["idx_to_predicate"]
    names = [BACKGROUND, *(names[str(i)] for i in range(1, 51))]
    groups = predicate_groups(names, torch.zeros(50))
    assert groups["head"] == [31, 20, 48, 30, 22, 29, 8] and groups["body"][:3] == [50, 21, 1]
    assert [len(group) for group in groups.values()] == [7, 21, 22] and sum(map(sum, groups.values())) == 50 * 51 // 2


def test_pair_accuracy_ranks_only_the_annotated_pairs():
    boxes = objects_at(*((20 * i, 0, 20 * i + 9, 9) for i in range(3)))
    scores = [[0.0, 0.9, 0, 0], [0.0, 0.8, 0, 0], [0.0, 0, 0.1, 0]]
    prediction = predict([(0, 1), (1, 2), (2, 0)], scores, of=boxes)
    targets = [truth((2, 0, 2), of=boxes), truth((0, 1, 3), (1, 2, 1), (2, 0, 1), of=boxes)]
    result = evaluate([prediction] * 2, targets, protocol="predcls", top_k=(1, 2))
    assert result["R@2"] == pytest.approx(1 / 6)
    assert result["A@1"] == pytest.approx(1 / 4) and result["A@2"] == pytest.approx(2 / 4)


@pytest.mark.parametrize("protocol", ["predcls", "sgcls"])
def test_given_boxes_must_equal_the_annotated_ones(protocol):
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=TWO | {"boxes": TWO["boxes"].flip(0)})
    with pytest.raises(ValueError, match=f"prediction boxes must equal .*, in the same order, for {protocol}"):
        evaluate([prediction], [truth((0, 1, 1))], protocol=protocol)


MISLABELED = predict([(0, 1)], [0.0, 1, 0, 0], of=TWO | {"labels": TWO["labels"].flip(0)})


def test_in_predcls_labels_must_equal_the_annotated_ones():
    with pytest.raises(ValueError, match="prediction labels must equal the target's"):
        evaluate([MISLABELED], [truth((0, 1, 1))], protocol="predcls")


def test_in_sgcls_labels_may_differ_from_the_annotated_ones():
    assert evaluate([MISLABELED], [truth((0, 1, 1))], protocol="sgcls")["R@1"] == 0


def test_images_without_prediction_can_be_skipped():
    metric = SceneGraphEvaluator("sgdet", PREDICATES, top_k=(1,), missing="skip")
    metric.update([FOUND[0], predict([], [])], [FOUND[1]] * 2)
    assert metric.compute()["R@1"] == 1 and metric.images == 1


def test_the_added_pixel_can_be_left_out():
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=objects_at((0, 0, 10, 4.9), (20, 0, 29, 9)))
    target = truth((0, 1, 1), of=objects_at((0, 0, 10, 10), (20, 0, 29, 9)))
    for plus_one, finds in ((True, True), (False, False)):
        metric = SceneGraphEvaluator("sgdet", PREDICATES, top_k=(1,), plus_one=plus_one)
        metric.update([prediction], [target])
        assert metric.compute()["R@1"] == finds


def test_phrase_detection_compares_enclosing_boxes_and_classes():
    """The subjects are far apart, but the boxes that enclose subject and object are nearly the same."""
    target = truth((0, 1, 1), of=objects_at((0, 0, 9, 9), (0, 0, 99, 99)))
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=objects_at((50, 50, 59, 59), (0, 0, 99, 89)))
    assert evaluate([prediction], [target], protocol="sgdet")["R@1"] == 0
    assert evaluate([prediction], [target], protocol="phrdet")["R@1"] == 1
    other = prediction | {"labels": torch.tensor([2, 2])}
    assert evaluate([other], [target], protocol="phrdet")["R@1"] == 0


RANKED = TWO | {"triplets": torch.tensor([[1, 0, 1], [0, 1, 2], [0, 1, 1]]), "triplet_scores": torch.ones(3)}


def test_given_triplets_keep_their_order():
    result = evaluate([RANKED], [truth((0, 1, 1), (0, 1, 2))], top_k=(1, 2, 3))
    assert [result[f"{name}@{k}"] for name in ("R", "ngR") for k in (1, 2, 3)] == [0, 0.5, 1] * 2


def strictly(predictions, targets, **options):
    metric = SceneGraphEvaluator("predcls", PREDICATES, top_k=(1, 2, 3), strict_constraint=True, **options)
    metric.update(predictions, targets)
    return {name: value.item() for name, value in metric.compute().items()}


def test_under_the_strict_constraint_only_the_first_given_triplet_of_a_pair_counts():
    """The second triplet of (0, 1) is removed before the first K are taken, so the triplet of (1, 1) moves up."""
    prediction = RANKED | {
        "triplets": torch.tensor([[1, 0, 1], [0, 1, 2], [0, 1, 1], [1, 1, 3]]),
        "triplet_scores": torch.ones(4),
    }
    result = strictly([prediction], [truth((0, 1, 1), (0, 1, 2), (1, 1, 3))])
    assert [result[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [result[f"A@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert result["mR@3"] == pytest.approx((0 + 1 + 1) / 3)
    assert [result[f"ngR@{k}"] for k in (1, 2, 3)] == pytest.approx([0, 1 / 3, 2 / 3])


def test_under_the_strict_constraint_only_the_best_of_repeated_pairs_counts():
    """The second row of (0, 1) is better. With equal scores, the first row counts."""
    target = truth((0, 1, 1), (0, 1, 2), (0, 1, 3))
    for scores, predicate in (([[0, 0.4, 0, 0], [0, 0, 0.5, 0]], "near"), ([[0, 0, 0, 0.4], [0, 0, 0.4, 0]], "has")):
        prediction = predict([(0, 1), (0, 1)], [[float(score) for score in row] for row in scores])
        assert evaluate([prediction], [target])["R@2"] == pytest.approx(2 / 3)
        result = strictly([prediction], [target], predicate_names=NAMES)
        assert result["R@3"] == pytest.approx(1 / 3) and result[f"R@3/{predicate}"] == 1


def test_without_the_graph_constraint_a_single_predicate_is_not_limited_to_one_triplet_per_pair():
    """With one predicate, both rankings have one predicate per row of `pairs`. Only one of them is strict."""
    of = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9))
    prediction = of | {"triplets": torch.tensor([[0, 1, 1], [0, 1, 1], [1, 2, 1]]), "triplet_scores": torch.ones(3)}
    metric = SceneGraphEvaluator("predcls", 1, top_k=(2,), strict_constraint=True)
    metric.update([prediction], [truth((1, 2, 1), of=of)])
    assert metric.compute()["R@2"] == 1 and metric.compute()["ngR@2"] == 0


def test_given_triplets_of_the_background_are_refused():
    with pytest.raises(ValueError, match=r"triplets\[:, 2\] must be from 1 to 3, got 0"):
        evaluate([RANKED | {"triplets": torch.tensor([[0, 1, 0]])}], [truth((0, 1, 1))])


# ---- the protocol of the VRD paper


def vrd(task, predictions, targets, **options):
    metric = VRDEvaluator(task, PREDICATES, **({"top_k": (1, 2, 5)} | options))
    metric.update(predictions, targets)
    return {name: value.item() for name, value in metric.compute().items()}


ONE_TRIPLET = predict([(0, 1)], [0.0, 0, 0, 1], of=objects_at((0, 0, 9, 8), (20, 0, 29, 9)))  # matches both relations
TWO_RELATIONS = truth((0, 2, 3), (1, 2, 3), of=objects_at((0, 0, 9, 9), (0, 0, 9, 7), (20, 0, 29, 9), labels=[1, 1, 2]))


def test_vrd_triplets_claim_one_relation_each():
    assert vrd("relationship", [ONE_TRIPLET], [TWO_RELATIONS])["relationship@1"] == 0.5


def test_vrd_recall_is_pooled_over_all_relations():
    """The second of two equal triplets claims the other relation. The second image has one relation, not found."""
    twice = ONE_TRIPLET | {"pairs": torch.tensor([[0, 1]] * 2), "predicate_scores": torch.tensor([[0.0, 0, 0, 1]] * 2)}
    result = vrd("relationship", [twice, ONE_TRIPLET], [TWO_RELATIONS, truth((0, 1, 1))])
    assert result["relationship@1"] == pytest.approx(1 / 3) and result["relationship@2"] == pytest.approx(2 / 3)


def test_vrd_triplets_claim_the_unclaimed_relation_that_they_overlap_best():
    """The first triplet matches both relations. It claims the better one, so the second triplet finds the other."""
    true = objects_at((0, 0, 9, 9), (0, 0, 9, 5), (20, 0, 29, 9), labels=[1, 1, 2])
    found = objects_at((0, 0, 9, 8), (0, 0, 9, 4), (20, 0, 29, 9), labels=[1, 1, 2])
    prediction = predict([(0, 2), (1, 2)], [[0.0, 0.9, 0, 0], [0.0, 0.8, 0, 0]], of=found)
    assert vrd("relationship", [prediction], [truth((1, 2, 1), (0, 2, 1), of=true)])["relationship@2"] == 1


SECOND_BEST = predict([(0, 1)], [0.0, 0.5, 0.3, 0.2]), truth((0, 1, 2))


def test_vrd_pairs_can_predict_several_predicates():
    prediction, target = SECOND_BEST
    assert vrd("predicate", [prediction], [target])["predicate@5"] == 0
    assert vrd("predicate", [prediction], [target], predicates_per_pair=2)["predicate@2"] == 1


def test_vrd_zero_shot_recall_keeps_the_ranks_of_all_triplets():
    """A wrong triplet has the first rank, although only zero-shot relations can be claimed."""
    prediction, target = SECOND_BEST
    zero_shot = vrd("phrase", [prediction], [target], predicates_per_pair=2, zero_shot=torch.tensor([[1, 2, 2]]))
    assert zero_shot["phrase@1/zero-shot"] == 0 and zero_shot["phrase@2/zero-shot"] == 1


def test_vrd_refuses_an_unknown_task():
    with pytest.raises(ValueError, match="task must be relationship, phrase or predicate, got 'sgdet'"):
        VRDEvaluator("sgdet", 3)


# ---- Open Images


RIGHT = torch.tensor([True, False, True])


def test_average_precision_adds_the_precision_at_each_right_triplet():
    # Each right triplet is worth 1 / 4 of the recall. The precisions are 1 and 2 / 3.
    assert average_precision(RIGHT, torch.tensor(4.0)).item() == pytest.approx((1 + 2 / 3) / 4)


def test_wrong_triplets_lower_the_average_precision_of_later_ones():
    assert average_precision(~RIGHT, torch.tensor(1.0)).item() == pytest.approx(1 / 2)


def test_average_precision_uses_the_best_precision_at_this_or_a_later_triplet():
    # The precisions are 0, 1 / 2 and 2 / 3.
    assert average_precision(torch.tensor([False, True, True]), torch.tensor(2.0)).item() == pytest.approx(2 / 3)


def test_average_precision_without_triplets_is_0():
    assert average_precision(RIGHT[:0], torch.tensor(4.0)).item() == 0


def test_open_images_score_weighs_recall_and_both_precisions():
    metric = OpenImagesEvaluator(PREDICATES)
    first = predict([(0, 1), (0, 1)], [[0.0, 0.9, 0, 0], [0.0, 0.8, 0, 0]])  # the second repeats the first
    second = predict([(1, 0)], [0.0, 0.85, 0, 0])  # wrong
    metric.update([first, second], [truth((0, 1, 1)), truth((0, 1, 1), (0, 1, 2))])
    result = metric.compute()
    # For the 2 relations with "on", the triplets are right, wrong and wrong. The relation with "near" is not found.
    assert result["R@50"] == pytest.approx(1 / 3)
    for kind in ("rel", "phr"):
        assert result[f"mAP_{kind}"] == pytest.approx(0.5 / 3)
        assert result[f"wmAP_{kind}"] == pytest.approx(0.5 * 2 / 3)
    assert result["score_wtd"] == pytest.approx(0.2 / 3 + 0.8 * 0.5 * 2 / 3)


def test_open_images_need_an_iou_above_one_half_for_precision_but_exactly_one_half_for_recall():
    prediction = predict([(0, 1)], [0.0, 1, 0, 0], of=objects_at((0, 0, 9, 4), (20, 0, 29, 9)))
    metric = OpenImagesEvaluator(PREDICATES)
    metric.update([prediction], [truth((0, 1, 1))])
    assert metric.compute()["R@50"] == 1 and metric.compute()["wmAP_rel"] == 0 and metric.compute()["wmAP_phr"] == 1


@settings(max_examples=60, deadline=None)
@given(batches, batches)
def test_open_images_score_does_not_depend_on_the_order_of_images_and_merges(first, second):
    whole, merged, other = (OpenImagesEvaluator(PREDICATES) for _ in range(3))
    whole.update(*split(first + second))
    merged.update(*split(second[::-1]))
    other.update(*split(first))
    merged.compute()
    merged.merge_state(other)
    assert {k: v.item() for k, v in merged.compute().items()} == pytest.approx(
        {k: v.item() for k, v in whole.compute().items()}, abs=1e-12
    )


def test_open_images_rank_the_wrong_one_of_equal_triplets_first():
    metric = OpenImagesEvaluator(PREDICATES)
    images = [(predict([(0, 1)], [0.0, 0.5, 0, 0]), truth((0, 1, p))) for p in (1, 2)]
    metric.update(*split(images))
    # The right triplet of "on" comes second, so its precision is 1 / 2. "on" has half of the weight.
    assert metric.compute()["wmAP_rel"] == 0.5 * 0.5


def test_open_images_score_is_0_before_the_first_image():
    assert OpenImagesEvaluator(PREDICATES).compute()["score_wtd"] == 0


def test_merging_into_an_empty_evaluator_gives_no_warning(recwarn):
    images = [(predict([(0, 1)], [0.0, 0.9, 0, 0]), truth((0, 1, 1)))]
    whole, part = (SceneGraphEvaluator("sgdet", PREDICATES) for _ in range(2))
    part.update(*split(images))
    whole.merge_state(part)
    assert whole.compute()["R@20"] == 1 and not recwarn.list


# ---- SGBench


def sgbench(predictions, targets, top_k=(1, 2, 5)):
    metric = SGBenchEvaluator(PREDICATES, top_k=top_k)
    metric.update(predictions, targets)
    return {name: value.item() for name, value in metric.compute().items()}


def ranked(*triplets, of=TWO):
    return of | {
        "triplets": torch.tensor(triplets, dtype=torch.int64).reshape(-1, 3),
        "triplet_scores": torch.ones(len(triplets)),
    }


def test_sgbench_counts_repeated_relations_once():
    assert sgbench([ranked((0, 1, 1))], [truth((0, 1, 1), (0, 1, 1), (1, 0, 2))])["R@1"] == 0.5


def test_sgbench_boxes_stand_for_one_object_each():
    """The box overlaps both objects by at least one half, and the second one more. The first object is not found."""
    true = objects_at((0, 0, 10, 10), (0, 0, 10, 7), (20, 0, 30, 10), labels=[1, 1, 2])
    prediction = ranked((0, 1, 1), of=objects_at((0, 0, 10, 8), (20, 0, 30, 10)))
    result = sgbench([prediction], [truth((0, 2, 1), (1, 2, 1), of=true)])
    assert result["R@1"] == 0.5 and result["R@inf"] == 0.5
    assert result["InstR"] == pytest.approx(2 / 3) and result["PairR@5"] == 0.5


@pytest.mark.parametrize("bottom, found", [(5, 1), (4.99, 0)])
def test_sgbench_boxes_are_as_wide_as_the_difference_of_their_corners(bottom, found):
    """An IoU of exactly one half is enough."""
    prediction = ranked((0, 1, 1), of=objects_at((0, 0, 10, bottom), (20, 0, 30, 10)))
    assert sgbench([prediction], [truth((0, 1, 1), of=objects_at((0, 0, 10, 10), (20, 0, 30, 10)))])["R@1"] == found


def test_sgbench_counts_the_first_of_the_first_k_triplets_of_a_pair_of_objects():
    """Boxes 0 and 2 stand for the same object. Without the cut before the removal, the third triplet would be second.
    Boxes 3 and 4 stand for nothing, so their triplets are of one pair.
    """
    of = objects_at((0, 0, 9, 9), (20, 0, 29, 9), (0, 0, 9, 8), (60, 0, 69, 9), (80, 0, 89, 9), labels=[1, 2, 1, 1, 1])
    prediction = ranked((0, 1, 2), (2, 1, 1), (1, 0, 3), of=of)
    result = sgbench([prediction], [truth((0, 1, 1), (0, 1, 2), (1, 0, 3))])
    assert [result[f"R@{k}"] for k in (1, 2, 5)] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert result["PairR@1"] == 1 and result["PairR@2"] == 1  # the first two relations are of one pair
    unmatched = ranked((3, 1, 1), (4, 1, 2), (0, 1, 1), of=of)
    assert sgbench([unmatched], [truth((0, 1, 1))])["R@2"] == 0


def test_sgbench_counts_repeated_triplets_once():
    prediction = ranked((1, 0, 1), (1, 0, 1), (0, 1, 1))
    assert sgbench([prediction], [truth((0, 1, 1))], top_k=(2,))["R@2"] == 1
    rows = predict([(1, 0), (1, 0), (0, 1)], [[0.0, 0.9, 0, 0], [0.0, 0.8, 0, 0], [0.0, 0.7, 0, 0]])
    assert sgbench([rows], [truth((0, 1, 1))], top_k=(2,))["R@2"] == 1


def test_sgbench_pair_recall_counts_the_first_k_relations():
    """In the order of subject, object and predicate, (0, 1, 3) is the first relation."""
    result = sgbench([ranked((1, 0, 2), (0, 1, 1))], [truth((1, 0, 1), (0, 1, 3))])
    assert result["PairR@1"] == 0 and result["PairR@2"] == 1 and result["R@2"] == 0
    assert sgbench([ranked((0, 1, 1))], [truth((1, 0, 1), (0, 1, 3))])["PairR@1"] == 1


def test_sgbench_ranks_a_predicate_among_those_of_its_pair():
    """The ranks of `near` are 1 and 0, that of `has` is 2. `on` of (1, 0) is not predicted for its pair."""
    prediction = ranked((1, 0, 2), (0, 1, 1), (0, 1, 1), (0, 1, 2), (1, 1, 3), (0, 1, 3))
    target = truth((0, 1, 2), (1, 0, 2), (0, 1, 3), (1, 0, 1))
    assert sgbench([prediction], [target])["PRank"] == pytest.approx(((1 + 0) / 2 + 2) / 2)
    scores = [[0.9, 0.2, 0.1, 0.3], [0.0, 0.1, 0.3, 0.2]]
    every = predict([(0, 1), (1, 0)], scores)  # all predicates of a row of `pairs` have a rank
    assert sgbench([every], [target])["PRank"] == pytest.approx(((2 + 0) / 2 + 0 + 2) / 3)


def test_sgbench_averages_predicates_over_images_and_then_over_predicates():
    found, other = truth((0, 1, 1)), truth((0, 1, 1), (1, 0, 1), (0, 0, 2), (1, 1, 3))
    result = sgbench([ranked((0, 1, 1))] * 2, [found, other])
    assert result["R@5"] == pytest.approx((1 + 1 / 4) / 2)
    assert result["mR@5"] == pytest.approx(((1 + 1 / 2) / 2 + 0 + 0) / 3) and result["mR@inf"] == 1


def test_sgbench_mean_recall_is_nan_if_a_predicate_never_occurs():
    result = sgbench([ranked((0, 1, 1))], [truth((0, 1, 1), (0, 1, 2))])
    assert math.isnan(result["mR@5"]) and math.isnan(result["mR@inf"]) and result["R@5"] == 0.5


def test_sgbench_images_without_predictions_have_recall_0_and_no_rank():
    nothing = ranked(of={"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)})
    target = truth((0, 1, 1), (0, 1, 2), (0, 1, 3))
    full = ranked((0, 1, 1))
    result = sgbench([full, nothing, full], [target, target, truth()])
    assert result["R@5"] == pytest.approx(1 / 6) and result["mR@5"] == pytest.approx(1 / 6)
    assert result["R@inf"] == result["mR@inf"] == result["InstR"] == result["PairR@5"] == 0.5 and result["PRank"] == 0


def test_sgbench_boxes_without_area_stand_for_no_object():
    flat = objects_at((0, 0, 0, 9), (20, 0, 29, 9))
    result = sgbench([ranked((0, 1, 1), of=flat)], [truth((0, 1, 1), of=flat)])
    assert result["R@5"] == 0 and result["InstR"] == 0.5


def test_sgbench_values_are_nan_before_the_first_image():
    assert all(math.isnan(value) for value in sgbench([], []).values())


@settings(max_examples=60, deadline=None)
@given(batches, batches)
def test_sgbench_evaluators_are_merged(first, second):
    whole, merged, other = (SGBenchEvaluator(PREDICATES, top_k=TOP_K) for _ in range(3))
    whole.update(*split(first + second))
    merged.update(*split(first))
    other.update(*split(second))
    merged.merge_state(other)
    assert {k: v.item() for k, v in merged.compute().items()} == pytest.approx(
        {k: v.item() for k, v in whole.compute().items()}, abs=1e-12, nan_ok=True
    )


# ---- refusals


@pytest.mark.parametrize("bad", [None, {"boxes": torch.zeros(0, 4)}, [torch.zeros(2)], iter([])])
def test_arguments_that_are_not_lists_of_dicts_are_refused(bad):
    metric = SceneGraphEvaluator("sgdet", PREDICATES)
    with pytest.raises(TypeError, match="predictions must be a list with a dict for each image, got"):
        metric.update(bad, [truth((0, 1, 1))])
    with pytest.raises(TypeError, match="targets must be a list with a dict for each image, got"):
        metric.update([predict([(0, 1)], [0.0, 0.9, 0, 0])], bad)


TRIPLETS = torch.tensor([[1, 1, 2], [2, 1, 1]])


@pytest.mark.parametrize(
    "own, other, name",
    [
        (SceneGraphEvaluator("sgdet", PREDICATES), SceneGraphEvaluator("predcls", PREDICATES), "protocol"),
        (SceneGraphEvaluator("sgdet", 3), SceneGraphEvaluator("sgdet", 4), "num_predicates"),
        (VRDEvaluator("phrase", 3), VRDEvaluator("phrase", 3, top_k=(10, 20)), "top_k"),
        (VRDEvaluator("phrase", 3, zero_shot=TRIPLETS), VRDEvaluator("phrase", 3, zero_shot=TRIPLETS[:1]), "zero_shot"),
        (SceneGraphEvaluator("sgdet", 3), SceneGraphEvaluator("sgdet", 3, strict_constraint=True), "strict_constraint"),
        (SGBenchEvaluator(3), SGBenchEvaluator(3, top_k=(5,)), "top_k"),
        (OpenImagesEvaluator(3), OpenImagesEvaluator(3, predicates_per_pair=2), "predicates_per_pair"),
    ],
)
def test_evaluators_with_different_settings_are_not_merged(own, other, name):
    with pytest.raises(ValueError, match=f"incoming_state must have the same {name}, "):
        own.merge_state(other)


def test_evaluators_with_the_same_zero_shot_triplets_are_merged():
    own, other = (VRDEvaluator("phrase", 3, zero_shot=triplets) for triplets in (TRIPLETS, TRIPLETS.flip(0)))
    own.merge_state(other)


GOOD = predict([(0, 1)], [0.1, 0.5, 0.2, 0.2], of=TWO), truth((0, 1, 1))
BAD_PREDICTIONS = {
    "scores": [torch.tensor([math.nan, 1]), torch.tensor([1.0, -1]), torch.ones(3), torch.ones(2, dtype=torch.int64)],
    "predicate_scores": [
        torch.full((1, 4), math.nan),
        torch.full((1, 4), math.inf),
        torch.ones(1, 3),
        torch.ones(2, 4),
    ],
    "pairs": [torch.tensor([[0, 2]]), torch.tensor([[-1, 0]]), torch.tensor([0, 1]), torch.tensor([[0.0, 1.0]])],
    "boxes": [
        torch.tensor([[5.0, 0, 4, 9], [0, 0, 1, 1]]),
        torch.full((2, 4), math.nan),
        torch.zeros(2, 5),
        [[0] * 4] * 2,
    ],
    "labels": [torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([1.0, 2.0])],
}
BAD_TARGETS = {
    "boxes": [torch.tensor([[0.0, 5, 4, 4], [0, 0, 1, 1]])],
    "labels": [torch.tensor([1, -1])],
    "relations": [torch.tensor([[0, 2, 1]]), torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 4]]), torch.ones(1, 3)],
}


@pytest.mark.parametrize("field, value", [(field, v) for field, values in BAD_PREDICTIONS.items() for v in values])
def test_malformed_predictions_are_refused_by_name(field, value):
    metric = SceneGraphEvaluator("predcls", PREDICATES)
    with pytest.raises(ValueError, match=rf"image at index 1: prediction {field}"):
        metric.update([GOOD[0], GOOD[0] | {field: value}], [GOOD[1]] * 2)
    assert metric.images == 0, "a refused update must not count its good image"


@pytest.mark.parametrize("field, value", [(field, v) for field, values in BAD_TARGETS.items() for v in values])
def test_malformed_targets_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"image 'a\.jpg': target {field}"):
        evaluate([GOOD[0]], [GOOD[1] | {"image_id": "a.jpg", field: value}])


def test_a_missing_field_is_refused_by_name():
    with pytest.raises(ValueError, match="prediction must have pairs"):
        evaluate([{k: v for k, v in GOOD[0].items() if k != "pairs"}], [GOOD[1]])


def test_predictions_and_targets_of_different_length_are_refused():
    with pytest.raises(ValueError, match="predictions and targets must have the same length, got 1 and 0"):
        evaluate([GOOD[0]], [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"protocol": "sggen"}, "protocol .* predcls, sgcls, sgdet, phrdet, got 'sggen'"),
        ({"num_predicates": 0}, "num_predicates .* got 0"),
        ({"top_k": ()}, "top_k"),
        ({"top_k": (20, 0)}, "top_k .* got"),
        ({"predicate_names": ["on", "near", "has"]}, "predicate_names must be 4"),
        ({"missing": "ignore"}, "missing must be 'zero' or 'skip', got 'ignore'"),
        ({"groups": {"head": [4]}}, r"groups\['head'\] must be from 1 to 3, got 4"),
        ({"groups": {"head": []}}, r"groups\['head'\] must have at least one predicate"),
        ({"zero_shot": torch.ones(2, 2, dtype=torch.int64)}, "zero_shot must be a tensor .* got .*2, 2"),
        ({"zero_shot": torch.zeros(1, 3, dtype=torch.int64)}, "zero_shot must be from 1 to 1048575, got 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneGraphEvaluator(**({"protocol": "predcls", "num_predicates": PREDICATES} | arguments))


# ---- objects


TRUE_BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
BOXES = torch.tensor([[0.0, 0, 10, 5], [20, 0, 30, 4], [40, 0, 50, 10]])  # IoU of 0.5, 0.4 and 1


def test_an_object_is_found_by_a_box_of_its_class_with_an_iou_of_one_half():
    found = find_objects(BOXES, torch.tensor([1, 2, 3]), TRUE_BOXES, torch.tensor([1, 2, 4]))
    assert found.tolist() == [True, False, False]


def test_no_boxes_find_no_objects():
    assert find_objects(BOXES[:0], torch.zeros(0).long(), TRUE_BOXES, torch.tensor([1, 2, 4])).tolist() == [False] * 3


def test_images_without_objects_have_nothing_to_find():
    assert find_objects(BOXES, torch.tensor([1, 2, 3]), TRUE_BOXES[:0], torch.zeros(0).long()).shape == (0,)
