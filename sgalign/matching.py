"""Functions that check and rank predicted triplets, and match them with annotated relations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.data.scene_graph import check_objects, check_range, check_tensor
from sgalign.errors import InputError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Triplets(NamedTuple):
    """The predicted triplets of one image, best first."""

    pairs: Tensor  # int64 [T, 2], subject and object index
    predicates: Tensor  # int64 [T], from 1
    scores: Tensor  # float64 [T]


def rank_triplets(
    prediction: Mapping[str, Tensor], depth: int, predicates_per_pair: int, among: Tensor | None = None
) -> Triplets:
    """Return the `depth` best triplets of an image, with at most `predicates_per_pair` predicates for each pair.

    A triplet's score is subject score x object score x predicate score, in float64. Ties go to the lower row of
    `pairs`, then to the lower predicate. A prediction with `triplets` is already ranked. Its order is kept, and
    `predicates_per_pair` is ignored.

    Args:
        prediction: as for `SceneGraphEvaluator.update`.
        depth: number of triplets.
        predicates_per_pair: number of best predicates that compete for each pair. 1 is the graph constraint.
        among: bool `[R]`, the rows of `pairs` (or of `triplets`) that compete. If None, all of them.
    """
    if "triplets" in prediction:
        rows = slice(None) if among is None else among
        pairs, predicates = prediction["triplets"][rows][:depth].split((2, 1), 1)
        return Triplets(pairs, predicates[:, 0], prediction["triplet_scores"][rows][:depth].double())
    pairs, foreground = prediction["pairs"], prediction["predicate_scores"][:, 1:]
    # A pair's best triplet outranks its others, so the `depth` best pairs contain the `depth` best triplets.
    object_scores, best = _pair_scores(prediction)
    if among is not None:
        best = best.where(among, -1)
    competing = len(best) if among is None else int(among.sum())
    rows = first(best, min(depth, competing)).sort().values
    foreground = foreground[rows]
    scores = object_scores[rows, None] * foreground.double()
    predicates_per_pair = min(predicates_per_pair, scores.shape[1])
    if predicates_per_pair < scores.shape[1]:
        lesser = foreground.sort(dim=1, descending=True, stable=True).indices[:, predicates_per_pair:]
        scores.scatter_(1, lesser, -1)
    ranked = first(scores.flatten(), min(depth, len(rows) * predicates_per_pair))
    return Triplets(pairs[rows[ranked // scores.shape[1]]], ranked % scores.shape[1] + 1, scores.flatten()[ranked])


def first_of_pairs(prediction: Mapping[str, Tensor]) -> Tensor:
    """Return a mask of the rows of `triplets` (or of `pairs`) that rank first among the rows of their pair, bool `[R]`.

    A pair is a (subject index, object index). A row of `pairs` ranks by its best triplet, as in `rank_triplets`.

    Args:
        prediction: as for `SceneGraphEvaluator.update`.
    """
    pairs = pairs_of(prediction)
    keys = pairs[:, 0] * len(prediction["labels"]) + pairs[:, 1]
    if "triplets" in prediction:
        return first_occurrences(keys)
    order = _pair_scores(prediction)[1].sort(descending=True, stable=True).indices
    return torch.zeros_like(keys, dtype=torch.bool).scatter(0, order, first_occurrences(keys[order]))


def pairs_of(prediction: Mapping[str, Tensor]) -> Tensor:
    """Return the subject and object indices of a prediction's `triplets`, or of its `pairs`, int64 `[R, 2]`."""
    return prediction["triplets"][:, :2] if "triplets" in prediction else prediction["pairs"]


def first_occurrences(values: Tensor) -> Tensor:
    """Return True for each value that does not occur earlier, bool `[N]`, for int64 values `[N]`."""
    distinct, group = values.unique(return_inverse=True)
    rows = torch.arange(len(values), device=values.device)
    earliest = torch.full_like(distinct, len(values)).scatter_reduce(0, group, rows, "amin")
    return earliest[group] == rows


def _pair_scores(prediction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return subject score x object score and the score of the best triplet of each row of `pairs`, float64 `[R]`."""
    pairs, foreground = prediction["pairs"], prediction["predicate_scores"][:, 1:]
    object_scores = prediction["scores"].double()[pairs].prod(1)
    return object_scores, object_scores * foreground.amax(1).double()


def first(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, highest first, int64 `[count]`. Ties go to the lower index."""
    if count == 0:
        return scores.new_zeros(0, dtype=torch.int64)
    # topk is several times as fast as a sort, but breaks ties arbitrarily. So only its lowest score is used. The
    # elements with at least this score are sorted.
    candidates = (scores >= scores.topk(count).values[-1]).nonzero()[:, 0]
    return candidates[scores[candidates].sort(descending=True, stable=True).indices[:count]]


def overlaps(boxes: Tensor, others: Tensor, plus_one: bool) -> Tensor:
    """Return the IoU of each box of `boxes` with each box of `others`, float64 `[N, M]`.

    All metrics use the threshold 0.5. If the coordinates are integers below 2^25, an IoU of 0.5 is computed exactly.

    Args:
        boxes, others: `[N, 4]` and `[M, 4]`, x1, y1, x2, y2.
        plus_one: if True, coordinates are pixel indices, and a box is x2 - x1 + 1 wide. If False, it is x2 - x1 wide.
    """
    boxes, others = boxes.double()[:, None], others.double()
    low, high = torch.maximum(boxes[..., :2], others[:, :2]), torch.minimum(boxes[..., 2:], others[:, 2:])
    common, area, other_area = (
        (extent + int(plus_one)).clamp(min=0).prod(-1)
        for extent in (high - low, boxes[..., 2:] - boxes[..., :2], others[..., 2:] - others[..., :2])
    )
    return common / (area + other_area - common)


def find_objects(boxes: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> Tensor:
    """Return a mask of the annotated objects that the detections find, bool `[G]`.

    An object is found if a detection of its class overlaps it with an IoU of at least 0.5.

    Args:
        boxes, labels: `[N, 4]` and `[N]`, the detections.
        true_boxes, true_labels: `[G, 4]` and `[G]`, the annotated objects.
    """
    return ((overlaps(boxes, true_boxes, plus_one=False) >= 0.5) & (labels[:, None] == true_labels)).any(0)


def union_boxes(boxes: Tensor, pairs: Tensor) -> Tensor:
    """Return the smallest box around both objects of each pair, `[R, 4]`, for pairs `[R, 2]`."""
    both = boxes[pairs]
    return torch.cat((both[..., :2].amin(1), both[..., 2:].amax(1)), 1)


def relation_overlaps(
    triplets: Triplets,
    prediction: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    *,
    phrase: bool,
    plus_one: bool = True,
) -> Tensor:
    """Return the overlap of each triplet with each relation, float64 `[T, M]`, or -1 if any of the classes differs.

    The overlap is the lower of the subject's and the object's IoU. With `phrase`, it is the IoU of the two boxes that
    enclose subject and object.
    """
    relations = target["relations"]
    if phrase:
        found = union_boxes(prediction["boxes"], triplets.pairs)
        overlap = overlaps(found, union_boxes(target["boxes"], relations[:, :2]), plus_one)
    else:
        objects = overlaps(prediction["boxes"], target["boxes"], plus_one)
        subject, object_ = triplets.pairs.unbind(1)
        overlap = objects[subject[:, None], relations[:, 0]].minimum(objects[object_[:, None], relations[:, 1]])
    classes = prediction["labels"][triplets.pairs][:, None] == target["labels"][relations[:, :2]]
    same = classes.all(2) & (triplets.predicates[:, None] == relations[:, 2])
    return overlap.where(same, -1)


def check_fields(where: str, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise InputError unless a prediction or an annotated image has the named fields."""
    if missing := [name for name in names if name not in fields]:
        raise InputError(f"{where}must have {', '.join(missing)}, got only {', '.join(fields) or 'an empty dict'}")


def check_scores(where: str, field: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise InputError unless `value` is a tensor of finite scores of at least 0 with this shape."""
    check_tensor(where, field, value, shape, FLOATS)
    if not value.numel():
        return
    # One pass checks for NaN too: if any element is NaN, the lowest and the highest are NaN.
    lowest, highest = value.aminmax()
    if not (lowest >= 0 and highest < float("inf")):
        place = (~((value >= 0) & value.isfinite())).nonzero()[0].tolist()
        raise InputError(f"{where}{field} must be finite and at least 0, got {value[tuple(place)].item()} at {place}")


def check_prediction(where: str, prediction: Mapping[str, Any], num_predicates: int) -> None:
    """Raise InputError unless a prediction has the fields that `SceneGraphEvaluator.update` describes."""
    ranked = "triplets" in prediction
    fields = ("triplets", "triplet_scores") if ranked else ("scores", "pairs", "predicate_scores")
    check_fields(where, prediction, ("boxes", "labels", *fields))
    check_objects(where, prediction["boxes"], prediction["labels"], FLOATS)
    count = len(prediction["labels"])
    if ranked:
        check_triplets(where, "triplets", prediction["triplets"], count, num_predicates)
        check_scores(where, "triplet_scores", prediction["triplet_scores"], (len(prediction["triplets"]),))
        return
    pairs = prediction["pairs"]
    check_tensor(where, "pairs", pairs, (None, 2), (torch.int64,))
    check_range(where, "pairs", pairs, 0, count - 1)
    check_scores(where, "scores", prediction["scores"], (count,))
    check_scores(where, "predicate_scores", prediction["predicate_scores"], (len(pairs), num_predicates + 1))


def check_triplets(where: str, field: str, triplets: Any, objects: int, num_predicates: int) -> None:
    """Raise InputError unless `triplets` is int64 `[T, 3]` with valid object indices and predicates from 1."""
    check_tensor(where, field, triplets, (None, 3), (torch.int64,))
    check_range(where, f"{field}[:, :2]", triplets[:, :2], 0, objects - 1)
    check_range(where, f"{field}[:, 2]", triplets[:, 2], 1, num_predicates)
