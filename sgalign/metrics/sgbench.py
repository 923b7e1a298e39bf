"""The metrics of the package SGBench: recall, mean recall, pair recall, instance recall and predicate rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.matching import first_occurrences, overlaps, pairs_of, rank_triplets
from sgalign.metrics.image_metric import ImageMetric, check_top_k


class SGBenchEvaluator(ImageMetric):
    """The metrics of SGBench (Lorenz et al., "A Review and Efficient Implementation of Scene Graph Generation Metrics",
    CVPR Workshops 2024).

    It follows the code of the public repository `lorjul/sgbench`. Release 1.0.0 of the package is older. It counts all
    triplets of a pair, and has no `R@inf` and no `mR@inf`. The rules are:

    - Repeated relations of an image count once. Images without relations do not count.
    - Each predicted box stands for one annotated object: the one of its class that it overlaps most, if the IoU is at
      least 0.5. Of equal overlaps, the first object is taken. A box is x2 - x1 wide. Other boxes stand for no object.
    - A triplet finds a relation if its boxes stand for the relation's objects and the predicates agree. Of the first K
      triplets, only the first of each pair of objects counts. All boxes that stand for no object are one object here.
    - Triplets are ranked as in `SceneGraphEvaluator`, and each row of `pairs` predicts only its best predicate.
      Triplets that occur several times in `triplets` count once.

    `compute` returns these values:

    - `R@K`: the fraction of the image's relations that are found, averaged over images.
    - `mR@K`: the recall of each predicate is averaged over the images that contain it, and then over all predicates.
      It is NaN if a predicate never occurs.
    - `R@inf`, `mR@inf`: the same, but a relation counts as found if boxes stand for both of its objects.
    - `PairR@K`: the fraction of the related pairs of objects that are among the first K triplets with any predicate,
      averaged over images. As in SGBench's `pair_recall`, only the first K relations of an image count, in the order of
      subject, object and predicate.
    - `InstR`: the fraction of the image's objects that some box stands for, averaged over images.
    - `PRank`: the rank of a relation's predicate, from 0, among the different predicates that are predicted for its
      pair of objects. All predicates of a row of `pairs` compete here. Relations whose predicate is not predicted for
      the pair are left out. The rank is averaged over the relations of each predicate of each image, and then over all
      predicates and images. Lower is better. It is NaN if no relation has a rank.

    Images without predictions have recall 0 and no rank. (SGBench adds 1 to NaN there, so its mean recall leaves them
    out.) A box without area stands for no object. (SGBench divides 0 by 0, and takes any annotated box without area of
    the same class.)

    Args:
        num_predicates: number of predicates without the background.
        top_k: the values of K.
    """

    higher_is_better = None  # a low predicate rank is good

    images: Tensor
    recalls: Tensor
    pair_recalls: Tensor
    instance_recalls: Tensor
    predicate_images: Tensor
    predicate_recalls: Tensor
    ranks: Tensor
    ranked: Tensor

    _settings = ("num_predicates", "top_k")

    def __init__(self, num_predicates: int, *, top_k: Sequence[int] = (20, 50, 100), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_predicates < 1:
            raise InputError(f"num_predicates must be at least 1, got {num_predicates}")
        self.num_predicates, self.top_k = num_predicates, check_top_k(top_k)
        depths = len(top_k)
        # The last depth of `recalls` and `predicate_recalls` is infinite.
        for state, shape in (
            ("images", ()),
            ("recalls", (depths + 1,)),
            ("pair_recalls", (depths,)),
            ("instance_recalls", ()),
            ("predicate_images", (num_predicates,)),
            ("predicate_recalls", (depths + 1, num_predicates)),
            ("ranks", ()),
            ("ranked", ()),
        ):
            self.add_state(state, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        relations = target["relations"].unique(dim=0)
        if not len(relations):
            return
        objects = _true_objects(prediction, target)
        matched = torch.isin(torch.arange(len(target["labels"]), device=objects.device), objects)
        # Ranking all pairs is slow. It is needed only if the removal of repeated triplets can move others up.
        repeated = not first_occurrences(_pair_keys(pairs_of(prediction))).all()
        depth = len(pairs_of(prediction)) if repeated else max(self.top_k)
        pairs, predicates, _ = rank_triplets(prediction, depth, predicates_per_pair=1)
        once = first_occurrences(self._triplet_keys(_pair_keys(pairs), predicates))
        pairs, predicates = objects[pairs[once]], predicates[once]
        keys, true_keys = _pair_keys(pairs), _pair_keys(relations[:, :2])
        triplets, true_triplets = self._triplet_keys(keys, predicates), self._triplet_keys(true_keys, relations[:, 2])
        counting = triplets.where(first_occurrences(keys), -1)
        found = [torch.isin(true_triplets, counting[:k]) for k in self.top_k]
        self._add_recalls(torch.stack([*found, matched[relations[:, :2]].all(1)]).double(), relations[:, 2] - 1)
        self.pair_recalls += torch.stack([_share(true_keys[:k].unique(), keys[:k]) for k in self.top_k])
        self.instance_recalls += matched.double().mean()
        self._add_ranks(prediction, objects, true_keys, relations[:, 2])

    def _add_recalls(self, found: Tensor, predicates: Tensor) -> None:
        """Add an image, for `found` float64 `[depths + 1, M]` and the relations' predicates `[M]` from 0."""
        count = torch.bincount(predicates, minlength=self.num_predicates).double()
        self.images += 1
        self.recalls += found.mean(1)
        self.predicate_images += count > 0
        by_predicate = torch.zeros_like(self.predicate_recalls).index_add_(1, predicates, found)
        self.predicate_recalls += by_predicate / count.clamp(min=1)

    def _add_ranks(
        self, prediction: Mapping[str, Tensor], objects: Tensor, true_keys: Tensor, true_predicates: Tensor
    ) -> None:
        related = torch.isin(_pair_keys(objects[pairs_of(prediction)]), true_keys)
        pairs, predicates, _ = rank_triplets(
            prediction, len(related) * self.num_predicates, self.num_predicates, among=related
        )
        keys = _pair_keys(objects[pairs])
        triplets = self._triplet_keys(keys, predicates)
        once = first_occurrences(triplets)
        found = triplets[once, None] == self._triplet_keys(true_keys, true_predicates)
        rank = (found * _rank_in_group(keys[once])[:, None]).sum(0).double()
        hit = found.any(0).double()
        sums = hit.new_zeros(2, self.num_predicates)
        sums.index_add_(1, true_predicates - 1, torch.stack((rank, hit)))
        self.ranks += (sums[0] / sums[1].clamp(min=1)).sum()
        self.ranked += (sums[1] > 0).sum()

    def _triplet_keys(self, pair_keys: Tensor, predicates: Tensor) -> Tensor:
        return pair_keys * (self.num_predicates + 1) + predicates

    def compute(self) -> dict[str, Tensor]:
        """Return the values, float64. All but `PRank` are fractions. Without images, all are NaN."""
        recall = self.recalls / self.images
        mean = (self.predicate_recalls / self.predicate_images).mean(1)
        pair_recall = self.pair_recalls / self.images
        result = {}
        for row, k in enumerate((*self.top_k, "inf")):
            result[f"R@{k}"], result[f"mR@{k}"] = recall[row], mean[row]
        result |= {f"PairR@{k}": pair_recall[row] for row, k in enumerate(self.top_k)}
        return result | {"InstR": self.instance_recalls / self.images, "PRank": self.ranks / self.ranked}


def _true_objects(prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Tensor:
    """Return the annotated object that each predicted box stands for, int64 `[N]`, or -1."""
    overlap = overlaps(prediction["boxes"], target["boxes"], plus_one=False)
    overlap = overlap.where(prediction["labels"][:, None] == target["labels"], 0)
    best = overlap.argmax(1)
    return best.where(overlap.gather(1, best[:, None])[:, 0] >= 0.5, -1)


def _pair_keys(pairs: Tensor) -> Tensor:
    """Return a different number of at least 0 for each pair of objects, int64 `[R]`, for indices from -1 `[R, 2]`."""
    subject, object_ = (pairs + 1).unbind(1)
    return (subject << 20) + object_


def _share(wanted: Tensor, found: Tensor) -> Tensor:
    return torch.isin(wanted, found).double().mean()


def _rank_in_group(groups: Tensor) -> Tensor:
    """Return the number of earlier elements of the same group, int64 `[N]`, for groups `[N]`."""
    ordered, order = groups.sort(stable=True)
    rank = torch.arange(len(groups), device=groups.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter(0, order, rank)
