"""A slow, literal scene graph evaluation, used as the oracle for the fast evaluators.

Everything is written with plain loops over Python numbers, one rule after the other. So each line can be compared with
the definition that it implements. Speed does not matter here.

An image is a pair (prediction, target) of dictionaries of NumPy arrays.

prediction  boxes [N, 4] (x1, y1, x2, y2), labels [N] (from 1), scores [N], and either
            pairs [R, 2] (subject index, object index) with predicate_scores [R, K + 1] (column 0 is the background and
            is never predicted), or
            triplets [T, 3] (subject index, object index, predicate from 1) with triplet_scores [T], already ranked.
target      boxes, labels, relations [M, 3] (subject index, object index, predicate from 1).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]
Image = tuple[Arrays, Arrays]
Box = tuple[float, float, float, float]

PROTOCOLS = ("predcls", "sgcls", "sgdet", "phrdet")
IOU_THRESHOLD = 0.5  # inclusive, so an IoU of exactly one half is enough


class Triplet(NamedTuple):
    """One relation, predicted or annotated. Annotated relations have score 1."""

    subject_index: int
    object_index: int
    subject_class: int
    predicate: int
    object_class: int
    subject_box: Box
    object_box: Box
    score: float

    @property
    def classes(self) -> tuple[int, int, int]:
        """The (subject class, predicate, object class), in the order of zero-shot lists."""
        return self.subject_class, self.predicate, self.object_class


# ----------------------------------------------------------------------------------------------------------------------
# Boxes
# ----------------------------------------------------------------------------------------------------------------------


def box_area(box: Box, offset: float) -> float:
    """Return the area of a box whose width is x2 - x1 + offset."""
    return (box[2] - box[0] + offset) * (box[3] - box[1] + offset)


def box_iou(a: Box, b: Box, offset: float) -> float:
    """Return the intersection over union in float64, or 0 if the boxes do not overlap."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (box_area(a, offset) + box_area(b, offset) - intersection)


def enclosing_box(a: Box, b: Box) -> Box:
    """Return the smallest box around both boxes."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def relation_overlap(predicted: Triplet, truth: Triplet, phrase: bool, offset: float) -> float:
    """Return the IoU of the enclosing boxes if `phrase`, otherwise the smaller of subject IoU and object IoU."""
    if phrase:
        predicted_box = enclosing_box(predicted.subject_box, predicted.object_box)
        truth_box = enclosing_box(truth.subject_box, truth.object_box)
        return box_iou(predicted_box, truth_box, offset)
    subject_iou = box_iou(predicted.subject_box, truth.subject_box, offset)
    object_iou = box_iou(predicted.object_box, truth.object_box, offset)
    return min(subject_iou, object_iou)


# ----------------------------------------------------------------------------------------------------------------------
# Reading an image
# ----------------------------------------------------------------------------------------------------------------------


def make_triplet(arrays: Arrays, subject_index: int, object_index: int, predicate: int, score: float) -> Triplet:
    """Return a triplet with the classes and boxes of a pair."""
    boxes, labels = arrays["boxes"], arrays["labels"]
    x1, y1, x2, y2 = (float(value) for value in boxes[subject_index])
    u1, v1, u2, v2 = (float(value) for value in boxes[object_index])
    return Triplet(
        subject_index=subject_index,
        object_index=object_index,
        subject_class=int(labels[subject_index]),
        predicate=predicate,
        object_class=int(labels[object_index]),
        subject_box=(x1, y1, x2, y2),
        object_box=(u1, v1, u2, v2),
        score=score,
    )


def annotated_relations(target: Arrays) -> list[Triplet]:
    """Return the annotated relations in their order. Repeated relations stay repeated."""
    return [make_triplet(target, int(s), int(o), int(p), 1.0) for s, o, p in target["relations"]]


def predicts_no_pair(prediction: Arrays) -> bool:
    """Return True if the prediction has neither pairs nor triplets."""
    return len(prediction["triplets"] if "triplets" in prediction else prediction["pairs"]) == 0


def given_ranking(prediction: Arrays) -> list[Triplet]:
    """Return the ranking that comes with the prediction, in the given order."""
    triplets = []
    for (s, o, p), score in zip(prediction["triplets"], prediction["triplet_scores"], strict=True):
        triplets.append(make_triplet(prediction, int(s), int(o), int(p), float(score)))
    return triplets


def ranked_triplets(prediction: Arrays, num_predicates: int, predicates_per_pair: int) -> list[Triplet]:
    """Return the best foreground predicates of each row of pairs, ranked by score.

    Within a row, the predicates are chosen by predicate score (ties: lower predicate first). Over all rows, triplets
    are ranked by subject score * object score * predicate score, descending (ties: lower row first, then lower
    predicate). A pair that is listed twice is predicted twice.
    """
    if "triplets" in prediction:
        return given_ranking(prediction)
    keyed: list[tuple[float, int, int, Triplet]] = []
    for row, (s, o) in enumerate(prediction["pairs"]):
        subject_index, object_index = int(s), int(o)
        subject_score = float(prediction["scores"][subject_index])
        object_score = float(prediction["scores"][object_index])
        predicate_scores = [float(value) for value in prediction["predicate_scores"][row]]
        if len(predicate_scores) != num_predicates + 1:
            raise ValueError(f"predicate_scores has {len(predicate_scores)} columns, not {num_predicates + 1}")
        foreground = sorted(range(1, num_predicates + 1), key=lambda p, values=predicate_scores: (-values[p], p))
        for predicate in foreground[:predicates_per_pair]:
            # Python floats are float64. The product is taken from left to right.
            score = subject_score * object_score * predicate_scores[predicate]
            triplet = make_triplet(prediction, subject_index, object_index, predicate, score)
            keyed.append((-score, row, predicate, triplet))
    keyed.sort(key=lambda entry: entry[:3])
    return [triplet for _, _, _, triplet in keyed]


def first_of_pairs(ranking: Sequence[Triplet]) -> list[Triplet]:
    """Return the triplets whose (subject index, object index) no better triplet has."""
    kept: dict[tuple[int, int], Triplet] = {}
    for triplet in ranking:
        kept.setdefault((triplet.subject_index, triplet.object_index), triplet)
    return list(kept.values())


def zero_shot_classes(zero_shot: np.ndarray | Sequence[Sequence[int]]) -> set[tuple[int, int, int]]:
    """Return the rows (subject class, predicate, object class) as a set."""
    return {(int(s), int(p), int(o)) for s, p, o in zero_shot}


# ----------------------------------------------------------------------------------------------------------------------
# Recall
# ----------------------------------------------------------------------------------------------------------------------


def found_by(predicted: Triplet, truths: Sequence[Triplet], phrase: bool, offset: float) -> set[int]:
    """Return the indices of all annotated relations that this triplet finds. There may be several."""
    found = set()
    for index, truth in enumerate(truths):
        same_classes = predicted.classes == truth.classes
        if same_classes and relation_overlap(predicted, truth, phrase, offset) >= IOU_THRESHOLD:
            found.add(index)
    return found


def found_by_first(hits: Sequence[set[int]], k: int) -> set[int]:
    """Return the indices of the relations that at least one of the first k triplets finds."""
    found: set[int] = set()
    for hit in hits[:k]:
        found |= hit
    return found


def mean(values: Sequence[float]) -> float:
    """Return the mean of the values, or 0 if there are none."""
    return sum(values) / len(values) if values else 0.0


def ratio(part: int, whole: int) -> float:
    """Return part / whole, or 0 if whole is 0."""
    return part / whole if whole else 0.0


class ImageResult(NamedTuple):
    """One counted image: its relations, and the relations that each triplet of the two rankings finds."""

    truths: list[Triplet]
    ranking: list[Triplet]  # with the graph constraint
    hits: list[set[int]]  # relations found by each triplet of `ranking`
    ng_hits: list[set[int]]  # relations found by each triplet of the ranking without the graph constraint


def image_recalls(results: Sequence[ImageResult], k: int, ng: bool) -> list[float]:
    """Return found / relations for each image."""
    recalls = []
    for result in results:
        found = found_by_first(result.ng_hits if ng else result.hits, k)
        recalls.append(len(found) / len(result.truths))
    return recalls


def zero_shot_recalls(
    results: Sequence[ImageResult], k: int, ng: bool, classes: set[tuple[int, int, int]]
) -> list[float]:
    """Return found / relations of the zero-shot relations, for each image that has one.

    The ranking still contains all triplets.
    """
    recalls = []
    for result in results:
        wanted = {index for index, truth in enumerate(result.truths) if truth.classes in classes}
        if not wanted:
            continue
        found = found_by_first(result.ng_hits if ng else result.hits, k) & wanted
        recalls.append(len(found) / len(wanted))
    return recalls


def predicate_recall(results: Sequence[ImageResult], k: int, ng: bool, predicate: int) -> float:
    """Return the mean recall of the predicate over the images that contain it, or 0 if none does."""
    recalls = []
    for result in results:
        wanted = {index for index, truth in enumerate(result.truths) if truth.predicate == predicate}
        if not wanted:
            continue
        found = found_by_first(result.ng_hits if ng else result.hits, k) & wanted
        recalls.append(len(found) / len(wanted))
    return mean(recalls)


def pooled_predicate_recall(results: Sequence[ImageResult], k: int, predicate: int) -> float:
    """Return found / relations of the predicate over the whole data set, or 0 if it does not occur."""
    num_found = num_total = 0
    for result in results:
        wanted = {index for index, truth in enumerate(result.truths) if truth.predicate == predicate}
        num_total += len(wanted)
        num_found += len(found_by_first(result.hits, k) & wanted)
    return ratio(num_found, num_total)


def pair_accuracy(results: Sequence[ImageResult], k: int) -> float:
    """Return A@K as SGPairAccuracy of Scene-Graph-Benchmark computes it (after ContrastiveLosses4VRD and KERN).

    The boxes are given in the order of the annotated boxes. So a predicted pair is an annotated pair if some relation
    has the same (subject index, object index). Only the triplets of annotated pairs are kept in the graph-constrained
    ranking. The relations that the first k kept triplets find are counted. The general rule (classes and IoU) decides
    which relations a kept triplet finds, so it may also find a relation of another pair.

    The result is pooled: the hits of all images divided by the relations of all images, not a mean of per-image ratios.
    SGPairAccuracy divides the mean of the hits by the mean of the counts, which is the same.
    """
    num_found = num_total = 0
    for result in results:
        annotated_pairs = {(truth.subject_index, truth.object_index) for truth in result.truths}
        kept = []
        for triplet, hit in zip(result.ranking, result.hits, strict=True):
            if (triplet.subject_index, triplet.object_index) in annotated_pairs:
                kept.append(hit)
        num_found += len(found_by_first(kept, k))
        num_total += len(result.truths)
    return ratio(num_found, num_total)


def evaluate(
    images: Sequence[Image],
    num_predicates: int,
    *,
    protocol: str = "sgdet",
    top_k: Sequence[int] = (20, 50, 100),
    zero_shot: np.ndarray | Sequence[Sequence[int]] | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    missing: str = "zero",
    iou_convention: float = 1.0,
    strict_constraint: bool = False,
) -> dict[str, float]:
    """Return the recall metrics of scene graph generation.

    Images without relations never count. Images with relations but without a predicted pair count 0 (missing='zero')
    or are left out of every metric (missing='skip'). A mean over no values is 0. With `strict_constraint`, the ranking
    with the graph constraint keeps only the first triplet of each (subject index, object index).
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}")
    if missing not in ("zero", "skip"):
        raise ValueError(f"unknown missing {missing!r}")
    phrase = protocol == "phrdet"
    num_ng = max(100, max(top_k))

    results: list[ImageResult] = []
    for prediction, target in images:
        truths = annotated_relations(target)
        if not truths:
            continue
        if predicts_no_pair(prediction) and missing == "skip":
            continue
        ranking = ranked_triplets(prediction, num_predicates, predicates_per_pair=1)
        if strict_constraint:
            ranking = first_of_pairs(ranking)
        ng_ranking = ranked_triplets(prediction, num_predicates, predicates_per_pair=num_predicates)[:num_ng]
        hits = [found_by(triplet, truths, phrase, iou_convention) for triplet in ranking]
        ng_hits = [found_by(triplet, truths, phrase, iou_convention) for triplet in ng_ranking]
        results.append(ImageResult(truths, ranking, hits, ng_hits))

    predicates = range(1, num_predicates + 1)
    metrics: dict[str, float] = {}
    for k in top_k:
        recall = mean(image_recalls(results, k, ng=False))
        per_predicate = {p: predicate_recall(results, k, ng=False, predicate=p) for p in predicates}
        mean_recall = mean([per_predicate[p] for p in predicates])

        metrics[f"R@{k}"] = recall
        metrics[f"mR@{k}"] = mean_recall
        metrics[f"mR_pooled@{k}"] = mean([pooled_predicate_recall(results, k, p) for p in predicates])
        metrics[f"ngR@{k}"] = mean(image_recalls(results, k, ng=True))
        metrics[f"ng-mR@{k}"] = mean([predicate_recall(results, k, ng=True, predicate=p) for p in predicates])
        if zero_shot is not None:
            classes = zero_shot_classes(zero_shot)
            metrics[f"zR@{k}"] = mean(zero_shot_recalls(results, k, ng=False, classes=classes))
            metrics[f"ng-zR@{k}"] = mean(zero_shot_recalls(results, k, ng=True, classes=classes))
        if protocol in ("predcls", "sgcls"):
            metrics[f"A@{k}"] = pair_accuracy(results, k)
        total = recall + mean_recall
        metrics[f"F@{k}"] = 2 * recall * mean_recall / total if total > 0 else 0.0
        for name, members in (groups or {}).items():
            metrics[f"mR@{k}/{name}"] = mean([per_predicate[int(p)] for p in members])
        for p in predicates:
            metrics[f"R@{k}/{p}"] = per_predicate[p]
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Open Images
# ----------------------------------------------------------------------------------------------------------------------

OPEN_IMAGES_OFFSET = 1.0  # pixels added to the width and the height of a box, as usual
OPEN_IMAGES_DETECTIONS = 100  # triplets kept per image
OPEN_IMAGES_RECALL = 50


class Detection(NamedTuple):
    """A predicted triplet, the image it belongs to and its rank there."""

    image: int
    rank: int
    triplet: Triplet


def interpolated_ap(is_correct: Sequence[bool], num_truths: int) -> float:
    """Return the all-points interpolated average precision (VOC 2010 and later).

    Each correct detection raises recall by 1 / num_truths. The precision credited to that step is the best precision
    reached at this detection or any later one. Recall that is never reached is credited 0.
    """
    precisions = []
    num_correct = 0
    for position, correct in enumerate(is_correct, start=1):
        num_correct += correct
        precisions.append(num_correct / position)
    total = 0.0
    for position, correct in enumerate(is_correct):
        if correct:
            total += max(precisions[position:])
    return total / num_truths


def predicate_ap(
    rankings: Sequence[Sequence[Triplet]], all_truths: Sequence[Sequence[Triplet]], predicate: int, phrase: bool
) -> float:
    """Return the average precision of one predicate over the data set."""
    detections = []
    for image, ranking in enumerate(rankings):
        for rank, triplet in enumerate(ranking):
            if triplet.predicate == predicate:
                detections.append(Detection(image, rank, triplet))
    # Detections claim relations in the order of their scores, then of their ranks in the image.
    detections.sort(key=lambda detection: (-detection.triplet.score, detection.rank))

    claimed: set[tuple[int, int]] = set()
    judged = []
    for detection in detections:
        # As in VOC, a detection is compared only with the relation of equal classes that it overlaps best, claimed or
        # not (ties: lower row). If a better detection has claimed that relation, this detection is wrong. Its
        # second-best relation is not tried.
        best_index, best_overlap = -1, -1.0
        for index, truth in enumerate(all_truths[detection.image]):
            if truth.classes != detection.triplet.classes:
                continue
            overlap = relation_overlap(detection.triplet, truth, phrase, OPEN_IMAGES_OFFSET)
            if overlap > best_overlap:
                best_index, best_overlap = index, overlap
        # The overlap must exceed one half, unlike in recall, where exactly one half is enough.
        correct = best_overlap > IOU_THRESHOLD and (detection.image, best_index) not in claimed
        if correct:
            claimed.add((detection.image, best_index))
        judged.append((-detection.triplet.score, correct))
    # The detections of all images are ranked together by score. Among equal scores, the wrong ones come first.
    is_correct = [correct for _, correct in sorted(judged)]
    num_truths = sum(truth.predicate == predicate for truths in all_truths for truth in truths)
    return interpolated_ap(is_correct, num_truths)


def open_images(images: Sequence[Image], num_predicates: int) -> dict[str, float]:
    """Return the Open Images score and its parts, with keys R@50, wmAP_rel, wmAP_phr and score_wtd.

    * The score is .2 * R@50 + .4 * wmAP_rel + .4 * wmAP_phr.
    * Detections are the first 100 triplets of the graph-constrained ranking of each image (or of the given ranking).
      There is no suppression of overlapping triplets and no score threshold.
    * R@50 is pooled: relations found by the first 50 triplets, divided by all relations of the data set. It uses the
      matching rule of recall (a triplet may find several relations, IoU of subject and object >= 0.5).
    * Every image takes part in average precision. Detections in an image without relations are wrong.
    * A predicate's weight is its share of all relations. A predicate without a relation has weight 0 and no AP.
    """
    rankings: list[list[Triplet]] = []
    all_truths: list[list[Triplet]] = []
    for prediction, target in images:
        ranking = ranked_triplets(prediction, num_predicates, predicates_per_pair=1)
        rankings.append(ranking[:OPEN_IMAGES_DETECTIONS])
        all_truths.append(annotated_relations(target))

    num_total = sum(len(truths) for truths in all_truths)
    num_found = 0
    for ranking, truths in zip(rankings, all_truths, strict=True):
        hits = [found_by(triplet, truths, False, OPEN_IMAGES_OFFSET) for triplet in ranking]
        num_found += len(found_by_first(hits, OPEN_IMAGES_RECALL))
    recall = ratio(num_found, num_total)

    weighted = {False: 0.0, True: 0.0}
    for predicate in range(1, num_predicates + 1):
        num_truths = sum(truth.predicate == predicate for truths in all_truths for truth in truths)
        if num_truths == 0:
            continue
        for phrase in (False, True):
            ap = predicate_ap(rankings, all_truths, predicate, phrase)
            weighted[phrase] += ap * num_truths / num_total
    return {
        "R@50": recall,
        "wmAP_rel": weighted[False],
        "wmAP_phr": weighted[True],
        "score_wtd": 0.2 * recall + 0.4 * weighted[False] + 0.4 * weighted[True],
    }


# ----------------------------------------------------------------------------------------------------------------------
# VRD
# ----------------------------------------------------------------------------------------------------------------------

VRD_OFFSET = 1.0  # pixels added to the width and the height of a box


def num_claimed(ranking: Sequence[Triplet], truths: Sequence[Triplet], phrase: bool) -> int:
    """Return the number of relations that the triplets claim.

    In order of rank, each triplet claims at most one unclaimed relation. Unlike in `open_images`, relations claimed
    before are skipped, so a triplet may claim its second-best relation.
    """
    claimed: set[int] = set()
    for triplet in ranking:
        best_index, best_overlap = -1, -1.0
        for index, truth in enumerate(truths):
            if index in claimed or truth.classes != triplet.classes:
                continue
            overlap = relation_overlap(triplet, truth, phrase, VRD_OFFSET)
            if overlap >= IOU_THRESHOLD and overlap > best_overlap:  # strictly better, so ties go to the lower row
                best_index, best_overlap = index, overlap
        if best_index >= 0:
            claimed.add(best_index)
    return len(claimed)


def vrd(
    images: Sequence[Image],
    num_predicates: int,
    *,
    predicates_per_pair: int = 1,
    top_k: Sequence[int] = (50, 100),
    zero_shot: np.ndarray | Sequence[Sequence[int]] | None = None,
    phrase: bool = False,
) -> dict[str, float]:
    """Return the recall of relationship or phrase detection of Lu et al., pooled over the data set.

    A ranking that comes with the prediction is used as it is. `predicates_per_pair` has no effect on it.
    """
    name = "phrase" if phrase else "relationship"
    classes = None if zero_shot is None else zero_shot_classes(zero_shot)
    metrics: dict[str, float] = {}
    for k in top_k:
        claims = total = zero_shot_claims = zero_shot_total = 0
        for prediction, target in images:
            ranking = ranked_triplets(prediction, num_predicates, predicates_per_pair)[:k]
            truths = annotated_relations(target)
            claims += num_claimed(ranking, truths, phrase)
            total += len(truths)
            if classes is not None:
                # The ranking keeps all triplets, but only zero-shot relations can be claimed.
                unseen = [truth for truth in truths if truth.classes in classes]
                zero_shot_claims += num_claimed(ranking, unseen, phrase)
                zero_shot_total += len(unseen)
        metrics[f"{name}@{k}"] = ratio(claims, total)
        if classes is not None:
            metrics[f"{name}@{k}/zero-shot"] = ratio(zero_shot_claims, zero_shot_total)
    return metrics
