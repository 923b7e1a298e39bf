"""Functions that bring the predictions of other systems for an image into the fields of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from torch import Tensor

from sgalign.errors import InputError, shown
from sgalign.files import read_array

# For each field, its names here, in Scene-Graph-Benchmark's two files, and in Motifs and EGTR.
NAMES = {
    "boxes": ("boxes", "bbox", "pred_boxes"),
    "labels": ("labels", "bbox_labels", "pred_labels", "pred_classes"),
    "scores": ("scores", "bbox_scores", "pred_scores", "obj_scores"),
    "pairs": ("pairs", "rel_pairs", "rel_pair_idxs", "pred_rel_inds"),
    "predicate_scores": ("predicate_scores", "rel_all_scores", "pred_rel_scores"),
    "triplets": ("triplets",),
    "triplet_scores": ("triplet_scores",),
}
_ENDS = ("sub", "obj")  # RelTR's subjects and objects


def standard_fields(where: str, image: Mapping[str, Any], names: tuple[Sequence[str], Sequence[str]]) -> dict[str, Any]:
    """Return the fields of an image's prediction under the names of `SceneGraphEvaluator.update`.

    The prediction may have this package's fields, the fields of `sgalign predict` (`objects` and `triplets` with class
    names), or those of another system:

    - Scene-Graph-Benchmark: `bbox`, `bbox_labels`, `bbox_scores`, `rel_pairs`, `rel_all_scores`
      (custom_prediction.json), or `pred_labels`, `pred_scores`, `rel_pair_idxs`, `pred_rel_scores`
      (eval_results.pytorch).
    - Neural Motifs and EGTR: `pred_boxes`, `pred_classes`, `obj_scores`, `pred_rel_inds`, `rel_scores`.
    - RelTR: `sub_boxes`, `sub_classes`, `sub_scores`, `obj_boxes`, `obj_classes`, `obj_scores`, `rel_scores`.

    A row of `rel_scores` has the scores of all predicates, with or without the background in front. If `rel_scores` has
    one number per pair, `rel_labels` are the predicates of these numbers, and the triplets are ranked by the product of
    their three scores. Labels and predicates are numbers from 1 or class names.

    Args:
        where: the file and the image, for messages.
        image: fields of the prediction: tensors, arrays or lists.
        names: names of the object classes and of the predicates, background first.

    Raises:
        ValueError: if the fields do not fit together, or a class name is unknown.
    """
    if "objects" in image:
        image = _of_objects(where, image)
    if "sub_boxes" in image:
        image = _of_ends(where, image)
    fields = {}
    for field, others in NAMES.items():
        if (known := next((name for name in others if name in image), None)) is not None:
            fields[field] = image[known]
    if "rel_scores" in image and not {"predicate_scores", "triplets"} & fields.keys():
        fields |= _of_relation_scores(where, image, fields, len(names[1]) - 1)
    if "labels" in fields:
        fields["labels"] = _numbers(where, "labels", fields["labels"], names[0])
    rows = fields.get("triplets")
    if isinstance(rows, list) and all(isinstance(row, (list, tuple)) and len(row) == 3 for row in rows):
        predicates = _numbers(where, "triplets", [row[2] for row in rows], names[1])
        fields["triplets"] = [[*row[:2], predicate] for row, predicate in zip(rows, predicates, strict=True)]
    return fields


def _numbers(where: str, field: str, classes: Any, names: Sequence[str]) -> Any:
    """Return the numbers of classes that are given by name. Numbers stay as they are."""
    if not isinstance(classes, list) or not any(isinstance(value, str) for value in classes):
        return classes
    numbers = {name: number for number, name in enumerate(names) if number}
    if unknown := [value for value in classes if isinstance(value, str) and value not in numbers]:
        raise InputError(
            f"{where}: {field} must be classes of the data set, such as {names[1]!r}, got {shown(unknown[0])}"
        )
    return [numbers[value] if isinstance(value, str) else value for value in classes]


def _of_objects(where: str, graph: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a graph as `sgalign predict` writes it, with a dict for each object and each triplet."""
    try:
        objects, triplets = graph["objects"], graph["triplets"]
        fields = {
            "boxes": [item["box"] for item in objects],
            "labels": [item["label"] for item in objects],
            "triplets": [[row["subject"], row["object"], row["predicate"]] for row in triplets],
            "triplet_scores": [row["score"] for row in triplets],
        }
        scores = [item["score"] for item in objects if "score" in item]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{where}: objects must have label and box, and triplets must have subject, predicate, object and score, "
            f"got {shown(graph)}"
        ) from error
    return fields | ({"scores": scores} if len(scores) == len(objects) else {})


def _of_ends(where: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an image whose every relation has a subject and an object of its own, as in RelTR."""
    fields: dict[str, Any] = {}
    for field, others in (("boxes", ("boxes",)), ("labels", ("classes", "labels")), ("scores", ("scores",))):
        parts = [next((image[f"{end}_{name}"] for name in others if f"{end}_{name}" in image), None) for end in _ENDS]
        if any(part is None for part in parts):
            wanted = " and ".join(f"{end}_{others[0]}" for end in _ENDS)
            raise InputError(f"{where}: must have {wanted} beside sub_boxes, got only {', '.join(image)}")
        lists = [_listed(where, f"{end}_{others[0]}", part) for end, part in zip(_ENDS, parts, strict=True)]
        if len(lists[0]) != len(lists[1]):
            got = f"{len(lists[0])} of subjects and {len(lists[1])} of objects"
            raise InputError(f"{where}: subjects and objects must have as many {field}, got {got}")
        fields[field] = lists[0] + lists[1]
    count = len(_listed(where, "sub_boxes", image["sub_boxes"]))
    fields["pairs"] = [[number, count + number] for number in range(count)]
    return fields | {name: image[name] for name in ("rel_scores", "rel_labels", "predicate_scores") if name in image}


def _of_relation_scores(
    where: str, image: Mapping[str, Any], fields: Mapping[str, Any], num_predicates: int
) -> dict[str, Any]:
    """Return `predicate_scores`, or `triplets` with their scores, from `rel_scores`."""
    scores = _listed(where, "rel_scores", image["rel_scores"])
    if all(isinstance(row, (list, tuple)) for row in scores):
        # Systems that do not score the background have a column less.
        return {"predicate_scores": [[0, *row] if len(row) == num_predicates else row for row in scores]}
    given = {"pairs": fields.get("pairs"), "rel_labels": image.get("rel_labels"), "scores": fields.get("scores")}
    pairs, predicates, objects = (_listed(where, field, values) for field, values in given.items())
    if len({len(scores), len(pairs), len(predicates)}) > 1:
        lengths = f"{len(scores)} rel_scores, {len(predicates)} rel_labels and {len(pairs)} pairs"
        raise InputError(f"{where}: rel_scores must have one number and one of rel_labels per pair, got {lengths}")
    try:
        ranked = sorted(
            ((objects[s] * objects[o] * score, [s, o, p]) for (s, o), p, score in zip(pairs, predicates, scores)),
            key=lambda item: -item[0],
        )
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(f"{where}: pairs must be two rows of {len(objects)} objects ({error})") from error
    return {"triplets": [triplet for _, triplet in ranked], "triplet_scores": [score for score, _ in ranked]}


def _listed(where: str, field: str, values: Any) -> list[Any]:
    """Return a list of plain values from a list, a tensor or an HDF5 data set."""
    if isinstance(values, h5py.Dataset):
        values = read_array(values)
    plain = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    if not isinstance(plain, list):
        raise InputError(f"{where}: {field} must be a list, got {shown(values)}")
    return plain
