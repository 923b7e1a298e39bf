"""Recall of scene graph generation, as the field computes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sgalign.data.scene_graph import check_objects, check_range, check_tensor

PROTOCOLS = ("predcls", "sgcls", "sgdet")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class SceneGraphEvaluator(Metric):
    """R@K and mR@K under the graph constraint: each row of `pairs` predicts its best predicate alone.

    A pair's triplet scores subject score x object score x predicate score, multiplied in float64, and the image's
    triplets are ranked by it; equal scores keep the order of `pairs`, and equal predicates of a pair favour the lower.
    A triplet finds a ground-truth relation if the three classes agree and both boxes overlap with an IoU of at least
    0.5, coordinates naming whole pixels (widths are x2 - x1 + 1, as in Fast R-CNN's code and all published figures). It
    may find several relations; a relation found several times counts once. Ground truth is taken as it is, repeated
    relations and relations of an object with itself included.

    - `R@K`: found in the first K / relations of the image, mean over images. Images without relations never count;
      images with relations for which nothing is predicted count 0.
    - `mR@K` (Chen et al., Tang et al., CVPR 2019): for each predicate the mean of that recall over the images that
      contain it, then the mean over all predicates, those never seen counting 0, as in Scene-Graph-Benchmark.
    - `mR_pooled@K`: for each predicate found / relations over the whole data set, then the mean over all predicates.
    - `R@K/NAME`: what `mR@K` averages, a predicate; only with `predicate_names`.

    The state is sums alone, in float64: it does not grow, and adds up over processes and files.

    Args:
        protocol: what was given to the model, for the record; what is compared is the same. "predcls": boxes and labels
            of the predictions are the ground truth's, in any order; "sgcls": the boxes are; "sgdet": nothing is.
        num_predicates: without the background.
        top_k: the K's.
        predicate_names: `num_predicates + 1` different names, background first.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    images: Tensor
    recalls: Tensor
    predicate_images: Tensor
    predicate_recalls: Tensor
    predicate_relations: Tensor
    predicate_found: Tensor

    def __init__(
        self,
        protocol: str,
        num_predicates: int,
        *,
        top_k: Sequence[int] = (20, 50, 100),
        predicate_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of those supported, {', '.join(PROTOCOLS)}, got {protocol!r}")
        if num_predicates < 1:
            raise ValueError(f"num_predicates must be at least 1, got {num_predicates}")
        if not isinstance(top_k, Sequence) or not top_k or any(type(k) is not int or k < 1 for k in top_k):
            raise ValueError(f"top_k must be integers of at least 1, got {top_k!r}")
        if predicate_names is not None and not (
            len(predicate_names) == len(set(predicate_names)) == num_predicates + 1
        ):
            raise ValueError(
                f"predicate_names must be {num_predicates + 1} different names, background first, got {predicate_names}"
            )
        self.protocol = protocol
        self.num_predicates = num_predicates
        self.top_k = tuple(top_k)
        self.predicate_names = None if predicate_names is None else list(predicate_names)
        for state, shape in (
            ("images", ()),
            ("recalls", (len(top_k),)),
            ("predicate_images", (num_predicates,)),
            ("predicate_recalls", (len(top_k), num_predicates)),
            ("predicate_relations", (num_predicates,)),
            ("predicate_found", (len(top_k), num_predicates)),
        ):
            self.add_state(state, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Adds images.

        Args:
            predictions: an image each: `boxes` float `[N, 4]` x1, y1, x2, y2 in pixels of the original image, `labels`
                int64 `[N]` from 1, `scores` float `[N]`, `pairs` int64 `[R, 2]` subject and object index,
                `predicate_scores` float `[R, num_predicates + 1]`, column 0 the background, which is never predicted.
            targets: an image each: `boxes`, `labels`, and `relations` int64 `[M, 3]` subject index, object index,
                predicate from 1. An `image_id` here or there names the image in errors.

        Raises:
            ValueError: a field is missing or malformed; names the field and the image. Nothing was added then.
        """
        if len(predictions) != len(targets):
            raise ValueError(f"predictions and targets must be as many, got {len(predictions)} and {len(targets)}")
        for position, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
            image = target.get("image_id", prediction.get("image_id"))
            where = f"image number {position} of this update: " if image is None else f"image {image!r}: "
            _check_prediction(where + "prediction ", prediction, self.num_predicates)
            _check_target(where + "target ", target, self.num_predicates)
        for prediction, target in zip(predictions, targets, strict=True):
            if len(target["relations"]):
                self._add(_to(prediction, self.recalls.device), _to(target, self.recalls.device))

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        rank = _first_rank(prediction, target, max(self.top_k))
        predicate = target["relations"][:, 2] - 1
        found = (rank < torch.tensor(self.top_k, device=rank.device)[:, None]).double()
        relations = torch.bincount(predicate, minlength=self.num_predicates).double()
        by_predicate = torch.zeros_like(self.predicate_found).index_add_(1, predicate, found)
        self.images += 1
        self.recalls += found.mean(1)
        self.predicate_images += relations > 0
        self.predicate_recalls += by_predicate / relations.clamp(min=1)
        self.predicate_relations += relations
        self.predicate_found += by_predicate

    def compute(self) -> dict[str, Tensor]:
        """Fractions, float64; all 0 before the first image with relations."""
        recall = self.recalls / self.images.clamp(min=1)
        by_predicate = self.predicate_recalls / self.predicate_images.clamp(min=1)
        pooled = self.predicate_found / self.predicate_relations.clamp(min=1)
        result = {}
        for row, k in enumerate(self.top_k):
            result[f"R@{k}"] = recall[row]
            result[f"mR@{k}"] = by_predicate[row].mean()
            result[f"mR_pooled@{k}"] = pooled[row].mean()
            for name, value in zip((self.predicate_names or [])[1:], by_predicate[row], strict=False):
                result[f"R@{k}/{name}"] = value
        return result


def _first_rank(prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], depth: int) -> Tensor:
    """Rank from 0 of the first triplet that finds each relation, `depth` if none of the first `depth` does: `[M]`."""
    # argmax takes the first of equal values, and unlike max() does not wake all threads for a few rows.
    foreground = prediction["predicate_scores"][:, 1:]
    predicate = foreground.argmax(1, keepdim=True)
    pairs = prediction["pairs"]
    score = prediction["scores"].double()[pairs].prod(1) * foreground.gather(1, predicate)[:, 0].double()
    best = score.sort(descending=True, stable=True).indices[:depth]
    subject, object_ = pairs[best].unbind(1)
    true_subject, true_object, true_predicate = target["relations"].unbind(1)
    same = (prediction["labels"][:, None] == target["labels"]) & _overlap(prediction["boxes"], target["boxes"])
    finds = (
        same[subject[:, None], true_subject]
        & same[object_[:, None], true_object]
        & (predicate[best] + 1 == true_predicate)
    )
    rank = torch.arange(len(best), device=finds.device)[:, None].where(finds, depth)
    return torch.cat((rank, rank.new_full((1, finds.shape[1]), depth))).amin(0)


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Whether the IoU of boxes `[N, 4]` and `[M, 4]`, edges being whole pixels, is at least 0.5: bool `[N, M]`."""
    boxes, others = boxes.double()[:, None], others.double()
    low, high = torch.maximum(boxes[..., :2], others[:, :2]), torch.minimum(boxes[..., 2:], others[:, 2:])
    common = (high - low + 1).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2] + 1).prod(-1) for b in (boxes, others)]
    # Without a division, so that one half is exact.
    return 3 * common >= areas[0] + areas[1]


def _to(fields: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in fields.items() if isinstance(value, Tensor)}


def _check_fields(where: str, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in fields]:
        raise ValueError(f"{where}must have {', '.join(missing)}, got only {', '.join(fields) or 'an empty dict'}")


def _check_prediction(where: str, prediction: Mapping[str, Any], num_predicates: int) -> None:
    _check_fields(where, prediction, ("boxes", "labels", "scores", "pairs", "predicate_scores"))
    check_objects(where, prediction["boxes"], prediction["labels"], _FLOATS)
    pairs, count = prediction["pairs"], len(prediction["labels"])
    check_tensor(where, "pairs", pairs, (None, 2), (torch.int64,))
    check_range(where, "pairs", pairs, 0, count - 1)
    for field, shape in (("scores", (count,)), ("predicate_scores", (len(pairs), num_predicates + 1))):
        check_tensor(where, field, prediction[field], shape, _FLOATS)
        # NaN is not at least 0 either.
        valid = (prediction[field] >= 0) & prediction[field].isfinite()
        if not valid.all():
            place = (~valid).nonzero()[0].tolist()
            value = prediction[field][tuple(place)].item()
            raise ValueError(f"{where}{field} must be finite and at least 0, got {value} at {place}")


def _check_target(where: str, target: Mapping[str, Any], num_predicates: int) -> None:
    _check_fields(where, target, ("boxes", "labels", "relations"))
    check_objects(where, target["boxes"], target["labels"], _FLOATS)
    relations = target["relations"]
    check_tensor(where, "relations", relations, (None, 3), (torch.int64,))
    check_range(where, "relations[:, :2]", relations[:, :2], 0, len(target["labels"]) - 1)
    check_range(where, "relations[:, 2]", relations[:, 2], 1, num_predicates)
