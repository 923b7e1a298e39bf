"""Predictions and annotations of an image as plain Python values, with class names instead of indices."""

from __future__ import annotations

from typing import Any

from sgalign.data import SceneGraph
from sgalign.matching import rank_triplets


def describe(
    prediction: dict[str, Any],
    object_names: list[str],
    predicate_names: list[str],
    top_k: int,
    *,
    threshold: float = 0.0,
    all_predicates: bool = False,
) -> dict[str, Any]:
    """Return one image's prediction as plain Python values, with class names instead of indices.

    A triplet's score is the product of the scores of both objects and the predicate. SGTR ranks its triplets itself,
    and several of them may belong to one pair.

    Args:
        prediction: one element of the list that a module's `predictions` returns.
        object_names: names of the object classes. Index 0 is the background.
        predicate_names: names of the predicates. Index 0 is the background.
        top_k: maximum number of triplets.
        threshold: lowest score of a triplet, from 0 to 1.
        all_predicates: if False, each pair has only its best predicate (the graph constraint). If True, all predicates
            of a pair compete.

    Returns:
        A dict with `image_id`, `objects` and `triplets`, best first. An object has `label`, `box` (x1, y1, x2, y2 in
        pixels, to 2 decimals) and `score`. A triplet has `subject` and `object` (indices into `objects`), `predicate`
        and `score`.
    """
    best = rank_triplets(prediction, top_k, len(predicate_names) - 1 if all_predicates else 1)
    return {
        "image_id": prediction["image_id"],
        "objects": [
            {"label": object_names[label], "box": [round(side, 2) for side in box], "score": round(score, 6)}
            for label, box, score in zip(
                prediction["labels"].tolist(), prediction["boxes"].tolist(), prediction["scores"].tolist(), strict=True
            )
        ],
        "triplets": [
            {
                "subject": subject,
                "predicate": predicate_names[predicate],
                "object": object_,
                "score": round(score, 6),
            }
            for (subject, object_), predicate, score in zip(*(field.tolist() for field in best), strict=True)
            if score >= threshold
        ],
    }


def describe_annotations(graph: SceneGraph, object_names: list[str], predicate_names: list[str]) -> dict[str, Any]:
    """Return the annotations of an image in the form that `describe` returns, without scores.

    Args:
        graph: the annotated scene graph.
        object_names: names of the object classes. Index 0 is the background.
        predicate_names: names of the predicates. Index 0 is the background.
    """
    return {
        "image_id": graph.image_id,
        "objects": [
            {"label": object_names[label], "box": box}
            for label, box in zip(graph.labels.tolist(), graph.boxes.tolist(), strict=True)
        ],
        "triplets": [
            {"subject": subject, "predicate": predicate_names[predicate], "object": object_}
            for subject, object_, predicate in graph.relations.tolist()
        ],
    }
