"""The predicted triplets that find annotated relations, by the evaluator's rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sgalign.matching import Triplets, relation_overlaps


def finders(predicted: dict[str, Any], annotated: dict[str, Any]) -> list[list[int]]:
    """Return the predicted triplets that find each annotated relation.

    The rule is that of `SceneGraphEvaluator`. A triplet finds a relation if the three classes agree and both boxes
    overlap with an IoU of at least 0.5, where a box is x2 - x1 + 1 wide. It may find several relations.

    Args:
        predicted: the predictions for an image, as `describe` returns them.
        annotated: the annotations of the image, as `describe_annotations` returns them.

    Returns:
        For each annotated triplet, the ascending indices of the predicted triplets that find it. The list is empty if
        the relation is missed.
    """
    numbers: dict[str, int] = {}
    ours, theirs = ([_number(item["label"], numbers) for item in graph["objects"]] for graph in (predicted, annotated))
    triplets = _rows(predicted["triplets"], numbers)
    overlaps = relation_overlaps(
        Triplets(triplets[:, :2], triplets[:, 2], torch.zeros(len(triplets), dtype=torch.float64)),
        {"boxes": _boxes(predicted), "labels": torch.tensor(ours, dtype=torch.int64)},
        {
            "boxes": _boxes(annotated),
            "labels": torch.tensor(theirs, dtype=torch.int64),
            "relations": _rows(annotated["triplets"], numbers),
        },
        phrase=False,
    )
    return [found.nonzero()[:, 0].tolist() for found in (overlaps >= 0.5).unbind(1)]


def _number(name: str, numbers: dict[str, int]) -> int:
    return numbers.setdefault(name, len(numbers))


def _boxes(graph: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([item["box"] for item in graph["objects"]], dtype=torch.float64).reshape(-1, 4)


def _rows(triplets: Iterable[dict[str, Any]], numbers: dict[str, int]) -> torch.Tensor:
    rows = [(t["subject"], t["object"], _number(t["predicate"], numbers)) for t in triplets]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
