"""A slow, literal version of SGBench's metrics, used as the oracle for `SGBenchEvaluator`.

It has plain loops over Python numbers, and takes images in the form that `evaluation_oracle` describes.
"""

import math
from collections.abc import Sequence

from evaluation_oracle import Arrays, Image, box_iou, ranked_triplets

NONE = -1  # the object of a box that stands for no annotated object


def mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN if there are no values."""
    return sum(values) / len(values) if values else math.nan


def true_objects(prediction: Arrays, target: Arrays) -> list[int]:
    """Return the annotated object that each predicted box stands for. Ties go to the first object."""
    objects = []
    for box, label in zip(prediction["boxes"].tolist(), prediction["labels"].tolist()):
        best, best_iou = NONE, 0.0
        for index, (true_box, true_label) in enumerate(zip(target["boxes"].tolist(), target["labels"].tolist())):
            iou = box_iou(box, true_box, 0.0)
            if label == true_label and iou >= 0.5 and iou > best_iou:
                best, best_iou = index, iou
        objects.append(best)
    return objects


def matched_ranking(prediction: Arrays, objects: list[int], num_predicates: int, predicates_per_pair: int) -> list:
    """Return (subject, object, predicate) of the ranked triplets, with annotated objects instead of predicted boxes.

    Triplets of the same boxes and predicate are listed once.
    """
    seen, matched = set(), []
    for triplet in ranked_triplets(prediction, num_predicates, predicates_per_pair):
        row = triplet.subject_index, triplet.object_index, triplet.predicate
        if row not in seen:
            seen.add(row)
            matched.append((objects[row[0]], objects[row[1]], row[2]))
    return matched


def first_of_each_pair(triplets: list) -> set:
    """Return the triplets that come first among those of their pair."""
    first = {}
    for subject, object_, predicate in triplets:
        first.setdefault((subject, object_), predicate)
    return {(*pair, predicate) for pair, predicate in first.items()}


def predicate_ranks(relations: list, ranking: list) -> list[float]:
    """Return the mean rank of the relations of each predicate that has ranked relations."""
    orders: dict = {}
    for subject, object_, predicate in ranking:
        order = orders.setdefault((subject, object_), [])
        if predicate not in order:
            order.append(predicate)
    ranks: dict = {}
    for subject, object_, predicate in relations:
        order = orders.get((subject, object_), [])
        if predicate in order:
            ranks.setdefault(predicate, []).append(order.index(predicate))
    return [mean(values) for values in ranks.values()]


def evaluate(images: Sequence[Image], num_predicates: int, top_k: Sequence[int]) -> dict[str, float]:
    """Return all metrics of `SGBenchEvaluator`."""
    values: dict[str, list[float]] = {"InstR": [], "PRank": []}
    by_predicate: dict[tuple, list[float]] = {}
    for prediction, target in images:
        relations = sorted({tuple(row) for row in target["relations"].tolist()})
        if not relations:
            continue
        objects = true_objects(prediction, target)
        ranking = matched_ranking(prediction, objects, num_predicates, 1)
        found = {k: [relation in first_of_each_pair(ranking[:k]) for relation in relations] for k in top_k}
        found["inf"] = [subject in objects and object_ in objects for subject, object_, _ in relations]
        for k, hits in found.items():
            values.setdefault(f"R@{k}", []).append(mean(hits))
            for predicate in {relation[2] for relation in relations}:
                own = [hit for hit, relation in zip(hits, relations) if relation[2] == predicate]
                by_predicate.setdefault((k, predicate), []).append(mean(own))
        for k in top_k:
            pairs = {relation[:2] for relation in relations[:k]}
            share = len(pairs & {triplet[:2] for triplet in ranking[:k]}) / len(pairs)
            values.setdefault(f"PairR@{k}", []).append(share)
        values["InstR"].append(len(set(objects) - {NONE}) / len(target["labels"]))
        every = matched_ranking(prediction, objects, num_predicates, num_predicates)
        values["PRank"] += predicate_ranks(relations, every)
    depths, predicates = [*top_k, "inf"], range(1, num_predicates + 1)
    names = [f"R@{k}" for k in depths] + [f"PairR@{k}" for k in top_k] + ["InstR", "PRank"]
    result = {name: mean(values.get(name, [])) for name in names}
    return result | {f"mR@{k}": mean([mean(by_predicate.get((k, p), [])) for p in predicates]) for k in depths}
