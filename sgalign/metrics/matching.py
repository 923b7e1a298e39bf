"""Functions and a base class that rank predicted triplets and match them with annotated relations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from sgalign.data.scene_graph import check_objects, check_range, check_tensor
from sgalign.errors import InputError

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    object_scores = prediction["scores"].double()[pairs].prod(1)
    # A pair's best triplet outranks its others, so the `depth` best pairs contain the `depth` best triplets.
    best = object_scores * foreground.amax(1).double()
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


class ImageMetric(Metric):
    """A base class for metrics that are updated with images.

    A subclass implements `_add`, which adds one image to the state.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    num_predicates: int
    _settings: tuple[str, ...]  # names of the attributes that must be equal when two evaluators are merged

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images to the metric.

        Args:
            predictions: one dict per image, with `boxes` float `[N, 4]` (x1, y1, x2, y2 in pixels of the original
                image), `labels` int64 `[N]` from 1, and either

                - `scores` float `[N]`, `pairs` int64 `[R, 2]` (subject and object index) and `predicate_scores` float
                  `[R, num_predicates + 1]`, where column 0 is the background, which is never predicted; or
                - `triplets` int64 `[T, 3]` (subject index, object index, predicate from 1), best first, and
                  `triplet_scores` float `[T]`. All metrics then use this ranking. SGTR's predictions have this form.
            targets: one dict per image, with `boxes`, `labels`, and `relations` int64 `[M, 3]` (subject index, object
                index, predicate from 1). If the target or the prediction has an `image_id`, error messages use it.

        Raises:
            TypeError: if `predictions` or `targets` is not a list of dicts.
            ValueError: if a field is missing or malformed. The message names the field and the image. The metric is
                then unchanged.
        """
        for name, images in (("predictions", predictions), ("targets", targets)):
            kinds = {type(image) for image in images} if isinstance(images, Sequence) else {type(images)}
            if not isinstance(images, Sequence) or not all(issubclass(kind, Mapping) for kind in kinds):
                got = ", ".join(sorted(kind.__name__ for kind in kinds))
                raise TypeError(f"{name} must be a list with a dict for each image, got {got}")
        if len(predictions) != len(targets):
            raise InputError(
                f"predictions and targets must have the same length, got {len(predictions)} and {len(targets)}"
            )
        for where, prediction, target in self._named(predictions, targets):
            self._check(where, prediction, target)
        for prediction, target in zip(predictions, targets, strict=True):
            self._add(_to(prediction, self.device), _to(target, self.device))

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the images of another evaluator with the same settings, for example from another file or process.

        Raises:
            ValueError: if the settings differ.
        """
        for name in self._settings if isinstance(incoming_state, type(self)) else ():
            own, other = getattr(self, name), getattr(incoming_state, name)
            if own != other:
                raise InputError(f"incoming_state must have the same {name}, {own!r}, got {other!r}")
        super().merge_state(incoming_state)
        self._computed = None  # otherwise compute would return the results from before the merge
        self._update_count += getattr(incoming_state, "_update_count", 1)

    def _named(
        self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
        for position, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            image = target.get("image_id", prediction.get("image_id"))
            where = f"image at index {position}: " if image is None else f"image {image!r}: "
            yield where, prediction, target

    def _check(self, where: str, prediction: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        check_prediction(where + "prediction ", prediction, self.num_predicates)
        _check_target(where + "target ", target, self.num_predicates)

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        raise NotImplementedError(f"{type(self).__name__} must override _add")


def check_top_k(top_k: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(top_k, Sequence) or not top_k or any(type(k) is not int or k < 1 for k in top_k):
        raise InputError(f"top_k must be integers of at least 1, got {top_k!r}")
    return tuple(top_k)


def _to(fields: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def _check_fields(where: str, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in fields]:
        raise InputError(f"{where}must have {', '.join(missing)}, got only {', '.join(fields) or 'an empty dict'}")


def _check_scores(where: str, field: str, value: Any, shape: tuple[int, ...]) -> None:
    check_tensor(where, field, value, shape, _FLOATS)
    if not value.numel():
        return
    # One pass checks for NaN too: if any element is NaN, the lowest and the highest are NaN.
    lowest, highest = value.aminmax()
    if not (lowest >= 0 and highest < float("inf")):
        place = (~((value >= 0) & value.isfinite())).nonzero()[0].tolist()
        raise InputError(f"{where}{field} must be finite and at least 0, got {value[tuple(place)].item()} at {place}")


def check_prediction(where: str, prediction: Mapping[str, Any], num_predicates: int) -> None:
    """Raise InputError unless a prediction has the fields that `ImageMetric.update` describes."""
    ranked = "triplets" in prediction
    fields = ("triplets", "triplet_scores") if ranked else ("scores", "pairs", "predicate_scores")
    _check_fields(where, prediction, ("boxes", "labels", *fields))
    check_objects(where, prediction["boxes"], prediction["labels"], _FLOATS)
    count = len(prediction["labels"])
    if ranked:
        check_triplets(where, "triplets", prediction["triplets"], count, num_predicates)
        _check_scores(where, "triplet_scores", prediction["triplet_scores"], (len(prediction["triplets"]),))
        return
    pairs = prediction["pairs"]
    check_tensor(where, "pairs", pairs, (None, 2), (torch.int64,))
    check_range(where, "pairs", pairs, 0, count - 1)
    _check_scores(where, "scores", prediction["scores"], (count,))
    _check_scores(where, "predicate_scores", prediction["predicate_scores"], (len(pairs), num_predicates + 1))


def _check_target(where: str, target: Mapping[str, Any], num_predicates: int) -> None:
    _check_fields(where, target, ("boxes", "labels", "relations"))
    check_objects(where, target["boxes"], target["labels"], _FLOATS)
    check_triplets(where, "relations", target["relations"], len(target["labels"]), num_predicates)


def check_triplets(where: str, field: str, triplets: Any, objects: int, num_predicates: int) -> None:
    """Raise InputError unless `triplets` is int64 `[T, 3]` with valid object indices and predicates from 1."""
    check_tensor(where, field, triplets, (None, 3), (torch.int64,))
    check_range(where, f"{field}[:, :2]", triplets[:, :2], 0, objects - 1)
    check_range(where, f"{field}[:, 2]", triplets[:, 2], 1, num_predicates)
