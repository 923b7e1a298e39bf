"""The score of the Open Images visual relationship challenge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.matching import rank_triplets, relation_overlaps
from sgalign.metrics.image_metric import ImageMetric

_DEPTH = 100  # number of best triplets per image that count


class OpenImagesEvaluator(ImageMetric):
    """The score of Open Images, 0.2 R@50 + 0.4 wmAP_rel + 0.4 wmAP_phr.

    It follows the script of PySGG (`oi_evaluation.py` and `ap_eval_rel.py`). SGTR's copy (`sgg_oi_evaluation.py`) reads
    the precision envelope one position too early. For a right triplet, it takes the best precision at this triplet,
    at the one before, or at any later one. It also counts the recall that no triplet reaches. Its average precision is
    therefore higher.

    `compute` returns these values:

    - `R@50`, `R@100`: the share of all relations of the data set that are found, matched as in `SceneGraphEvaluator`.
    - `mAP_rel`, `mAP_phr`: the average precision of each predicate, averaged over all predicates. Average precision is
      the area under the precision envelope. It uses the 100 best triplets of every image.
    - `wmAP_rel`, `wmAP_phr`: the same, with each predicate weighted by its share of the relations.
    - `score_wtd`: the score.

    A triplet is right or wrong by these rules:

    - The overlap with a relation is the lower of the subject's and the object's IoU (rel), or the IoU of the boxes that
      enclose both objects (phr).
    - Among the relations with its three classes, a triplet is compared only with the one that it overlaps most. It is
      right if this overlap is above 0.5 and no better triplet has claimed the relation before.
    - In images without relations, all triplets are wrong.
    - Among triplets with equal scores the wrong ones come first, so the order of the images has no effect.

    The state keeps one score, one predicate and two flags per triplet.

    Args:
        num_predicates: number of predicates without the background.
        predicates_per_pair: number of predicates that compete for each pair.
    """

    scores: list[Tensor]
    predicates: list[Tensor]
    right: list[Tensor]
    found: Tensor
    relations: Tensor

    _settings = ("num_predicates", "predicates_per_pair")

    def __init__(self, num_predicates: int, *, predicates_per_pair: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("num_predicates", num_predicates), ("predicates_per_pair", predicates_per_pair)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.num_predicates, self.predicates_per_pair = num_predicates, predicates_per_pair
        for state in ("scores", "predicates", "right"):
            self.add_state(state, [], dist_reduce_fx="cat")
        self.add_state("found", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("relations", torch.zeros(num_predicates, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        triplets = rank_triplets(prediction, _DEPTH, self.predicates_per_pair)
        overlap = [relation_overlaps(triplets, prediction, target, phrase=phrase) for phrase in (False, True)]
        for column, k in enumerate((50, 100)):
            self.found[column] += (overlap[0][:k] >= 0.5).any(0).sum()
        self.relations += torch.bincount(target["relations"][:, 2] - 1, minlength=self.num_predicates)
        self.scores.append(triplets.scores)
        self.predicates.append(triplets.predicates)
        self.right.append(torch.stack([_right(o) for o in overlap], 1))

    def compute(self) -> dict[str, Tensor]:
        """Return the values as fractions, float64. All are 0 before the first image with relations."""
        precisions = self.relations.new_zeros(self.num_predicates, 2)
        if self.scores:
            scores, predicates, right = (torch.cat(_as_list(s)) for s in (self.scores, self.predicates, self.right))
            for predicate in (self.relations > 0).nonzero()[:, 0]:
                own = predicates == predicate + 1
                wrong_first = right[own].int().argsort(dim=0, stable=True)
                by_score = scores[own][wrong_first].argsort(dim=0, descending=True, stable=True)
                ranked = right[own].gather(0, wrong_first.gather(0, by_score))
                precisions[predicate] = average_precision(ranked, self.relations[predicate])
        total = self.relations.sum().clamp(min=1)
        recall = self.found / total
        weighted = (precisions * (self.relations / total)[:, None]).sum(0)
        mean = precisions.mean(0)
        return {
            "R@50": recall[0],
            "R@100": recall[1],
            "mAP_rel": mean[0],
            "mAP_phr": mean[1],
            "wmAP_rel": weighted[0],
            "wmAP_phr": weighted[1],
            "score_wtd": 0.2 * recall[0] + 0.4 * weighted[0] + 0.4 * weighted[1],
        }


def average_precision(right: Tensor, relations: Tensor) -> Tensor:
    """Return the area under the precision envelope, float64 `[...]`.

    Args:
        right: bool `[T, ...]`, True for each triplet that is right, best triplet first.
        relations: number of relations to find.
    """
    if not len(right):
        return right.new_zeros(right.shape[1:], dtype=torch.float64)
    found = right.double().cumsum(0)
    precision = found / torch.arange(1, len(right) + 1, device=right.device).double().reshape(
        -1, *[1] * (right.dim() - 1)
    )
    # The envelope is the best precision at this recall or above. Recall grows by 1 / relations at every right triplet.
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return (envelope * right).sum(0) / relations


def _right(overlap: Tensor) -> Tensor:
    """Return bool `[T]`, True for each right triplet, for overlaps `[T, M]` of triplets and relations.

    A triplet is right if its highest overlap with a relation is above 0.5, and no better triplet has claimed that
    relation.
    """
    rows = torch.arange(len(overlap), device=overlap.device)
    right = torch.zeros_like(rows, dtype=torch.bool)
    if overlap.numel():
        best = overlap.argmax(1)
        hits = (overlap.gather(1, best[:, None]) > 0.5) & (
            best[:, None] == torch.arange(overlap.shape[1], device=rows.device)
        )
        first = rows[:, None].where(hits, len(rows)).amin(0)
        right[first[first < len(rows)]] = True
    return right


def _as_list(state: list[Tensor] | Tensor) -> list[Tensor]:
    """Return a list state as a list. Synchronization between processes concatenates it into one tensor."""
    return [state] if isinstance(state, Tensor) else state
