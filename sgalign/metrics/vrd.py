"""Recall by the protocol of VRD, the data set and paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sgalign.data.triplets import TripletSet
from sgalign.errors import InputError
from sgalign.metrics.matching import ImageMetric, check_top_k, rank_triplets, relation_overlaps


class VRDEvaluator(ImageMetric):
    """Recall of relationship, phrase and predicate detection (Lu et al., "Visual Relationship Detection", ECCV 2016).

    Other than `SceneGraphEvaluator`: recall is found / relations over the whole data set, and each triplet, best first,
    claims one relation, the unclaimed one of its classes that it overlaps best if that is an IoU of at least 0.5.

    Keys are `relationship@K`, `phrase@K` (the boxes around both objects are compared) or `predicate@K` (boxes and
    labels were given), and `.../zero-shot`, where only zero-shot relations can be claimed. The published denominators
    are 7775 and 1788 relations; the released annotations have 7638 and 1169 (1170 counted from them): figures of this
    class are shares of the latter.

    Args:
        task: what was to be found. "predicate" is compared as "relationship" is.
        num_predicates: without the background.
        predicates_per_pair: how many predicates of a pair compete: 1 in the paper, up to 70 in later work ("k").
        top_k: the K's.
        zero_shot: int64 `[Z, 3]` subject class, predicate, object class; None for no such figures.
    """

    found: Tensor
    relations: Tensor

    _settings = ("task", "num_predicates", "predicates_per_pair", "top_k", "zero_shot")

    def __init__(
        self,
        task: Literal["relationship", "phrase", "predicate"],
        num_predicates: int,
        *,
        predicates_per_pair: int = 1,
        top_k: Sequence[int] = (50, 100),
        zero_shot: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in ("relationship", "phrase", "predicate"):
            raise InputError(f"task must be relationship, phrase or predicate, got {task!r}")
        for name, value in (("num_predicates", num_predicates), ("predicates_per_pair", predicates_per_pair)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.task, self.num_predicates, self.predicates_per_pair = task, num_predicates, predicates_per_pair
        self.top_k = check_top_k(top_k)
        self.zero_shot = None if zero_shot is None else TripletSet("zero_shot", zero_shot)
        subsets = 1 if zero_shot is None else 2
        self.add_state("found", torch.zeros(subsets, len(top_k), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("relations", torch.zeros(subsets, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        triplets = rank_triplets(prediction, max(self.top_k), self.predicates_per_pair)
        overlap = relation_overlaps(triplets, prediction, target, phrase=self.task == "phrase")
        subsets = [overlap.new_ones(overlap.shape[1], dtype=torch.bool)]
        if self.zero_shot is not None:
            subsets.append(self.zero_shot.has_relations(target))
        top_k = torch.tensor(self.top_k, device=overlap.device)
        for row, subset in enumerate(subsets):
            rank = torch.tensor(_claiming(overlap[:, subset]), device=overlap.device)
            self.found[row] += (rank < top_k[:, None]).sum(1)
            self.relations[row] += subset.sum()

    def compute(self) -> dict[str, Tensor]:
        """Fractions, float64; 0 where there is no relation."""
        recall = self.found / self.relations.clamp(min=1)[:, None]
        names = ("", "/zero-shot")[: len(recall)]
        return {
            f"{self.task}@{k}{name}": recall[row, column]
            for row, name in enumerate(names)
            for column, k in enumerate(self.top_k)
        }


def _claiming(overlap: Tensor) -> list[int]:
    """The triplets, rows of `[T, M]`, that claim a relation; of relations overlapped equally well the first is."""
    overlap, rows = overlap.clone(), []
    for row in (overlap >= 0.5).any(1).nonzero()[:, 0].tolist():
        relation = overlap[row].argmax()
        if overlap[row, relation] >= 0.5:
            overlap[:, relation] = -1
            rows.append(row)
    return rows
