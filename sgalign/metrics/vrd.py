"""Recall of the VRD paper's protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sgalign.data.triplets import TripletSet
from sgalign.errors import InputError
from sgalign.matching import rank_triplets, relation_overlaps
from sgalign.metrics.image_metric import ImageMetric, check_top_k


class VRDEvaluator(ImageMetric):
    """Recall of relationship, phrase and predicate detection (Lu et al., "Visual Relationship Detection", ECCV 2016).

    It differs from `SceneGraphEvaluator` in two ways. Recall is the share of all relations of the data set that are
    found. Triplets are processed from best to worst, and each claims at most one relation: the unclaimed relation with
    the same three classes that it overlaps most, if the overlap is at least 0.5.

    `compute` returns these keys:

    - `relationship@K`: subject and object boxes are compared.
    - `phrase@K`: the boxes that enclose both objects are compared.
    - `predicate@K`: the same as `relationship@K`, for a model that was given boxes and labels.
    - `.../zero-shot`: the same, but only zero-shot relations can be claimed.

    The values are divided by the number of relations in the annotations. Published figures divide by 7775 relations, or
    by 1788 for zero-shot relations. The released annotations have 7638 relations. Of these, 1169 are zero-shot by the
    authors' mask, or 1170 if counted from the annotations.

    Args:
        task: "relationship", "phrase" or "predicate". "predicate" uses the same matching as "relationship".
        num_predicates: number of predicates without the background.
        predicates_per_pair: number of predicates that compete for each pair. It is 1 in the paper. Later work uses up
            to 70 and calls it "k".
        top_k: the values of K.
        zero_shot: int64 `[Z, 3]`, subject class, predicate, object class of the zero-shot triplets. If None, there are
            no zero-shot values.
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
        """Return the values as fractions, float64. A value without any relation is 0."""
        recall = self.found / self.relations.clamp(min=1)[:, None]
        names = ("", "/zero-shot")[: len(recall)]
        return {
            f"{self.task}@{k}{name}": recall[row, column]
            for row, name in enumerate(names)
            for column, k in enumerate(self.top_k)
        }


def _claiming(overlap: Tensor) -> list[int]:
    """Return the ranks from 0 of the triplets that claim a relation, for overlaps `[T, M]` of triplets and relations.

    If a triplet overlaps several relations equally well, it claims the first.
    """
    overlap, rows = overlap.clone(), []
    for row in (overlap >= 0.5).any(1).nonzero()[:, 0].tolist():
        relation = overlap[row].argmax()
        if overlap[row, relation] >= 0.5:
            overlap[:, relation] = -1
            rows.append(row)
    return rows
