"""Recall of scene graph generation: R@K, mean recall, recall without graph constraint, and zero-shot recall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sgalign.data.scene_graph import check_range
from sgalign.data.triplets import TripletSet
from sgalign.errors import InputError
from sgalign.matching import first_of_pairs, pairs_of, rank_triplets, relation_overlaps
from sgalign.metrics.image_metric import ImageMetric, check_top_k

PROTOCOLS = ("predcls", "sgcls", "sgdet", "phrdet")

# BGNN's groups (Li et al., CVPR 2021), which SGTR and the relation alignment paper use too.
VG150_GROUPS = {
    "head": "on, has, wearing, of, in, near, behind",
    "body": "with, holding, above, under, wears, sitting on, in front of, riding, standing on, at, attached to, over, "
    "carrying, walking on, for, watching, looking at, hanging from, and, belonging to, parked on",
    "tail": "laying on, between, along, eating, covering, covered in, part of, using, to, on back of, across, "
    "walking in, mounted on, lying on, against, from, growing on, painted on, playing, made of, says, flying in",
}


def predicate_groups(predicate_names: Sequence[str], counts: Tensor | None) -> dict[str, list[int]]:
    """Return the head, body and tail groups of the predicates.

    VG150's predicates get the published groups. Other predicates are split by frequency in the same proportions, 7, 21
    and 22 of 50. Without a training split there are no frequencies, so other predicates have no groups.

    Args:
        predicate_names: names of the predicates, background first.
        counts: `[len(predicate_names) - 1]`, number of training relations of each predicate. Ties keep their order. If
            None, there is no training split.

    Returns:
        The predicates of each group, numbered from 1, most frequent first. Empty groups are left out.
    """
    published = {group: names.split(", ") for group, names in VG150_GROUPS.items()}
    if set(predicate_names[1:]) == {name for names in published.values() for name in names}:
        return {group: [predicate_names.index(name) for name in names] for group, names in published.items()}
    if counts is None:
        return {}
    order = (counts.argsort(descending=True, stable=True) + 1).tolist()
    head, tail = round(len(order) * 7 / 50), round(len(order) * 28 / 50)
    groups = {"head": order[:head], "body": order[head:tail], "tail": order[tail:]}
    return {group: predicates for group, predicates in groups.items() if predicates}


class SceneGraphEvaluator(ImageMetric):
    """Recall at K and the metrics derived from it.

    The metrics follow Scene-Graph-Benchmark and SGTR, with two exceptions. Scores are multiplied in float64, and images
    without predictions count as 0 (see `missing`). Triplets are ranked and matched by these rules:

    - An image's triplets are ranked by subject score x object score x predicate score, multiplied in float64. Ties go
      to the lower row of `pairs`, then to the lower predicate.
    - Under the graph constraint, each row of `pairs` predicts only its best predicate. Predictions with `triplets`
      are not limited in this way, unless `strict_constraint` is True. Metrics with `ng` have no graph constraint, so
      all predicates of a pair compete.
    - A triplet finds a relation if the three classes agree and both boxes overlap with an IoU of at least 0.5. (With
      "phrdet", the box around both objects must do so.) It may find several relations. A relation that is found several
      times counts once.
    - The ground truth is used as it is, including repeated relations and relations of an object with itself.

    The metrics are:

    - `R@K`, `ngR@K`: the fraction of the image's relations that the first K triplets find, averaged over images.
      Images without relations never count.
    - `zR@K`, `ng-zR@K`: the same for zero-shot relations only, averaged over the images that have zero-shot relations.
    - `mR@K`, `ng-mR@K` (Chen et al., Tang et al., CVPR 2019): the recall of each predicate is averaged over the images
      that contain the predicate, and then over all predicates. Predicates that never occur count as 0.
    - `mR_pooled@K`: the share of each predicate's relations in the whole data set that are found, averaged over all
      predicates.
    - `R@K/NAME`: the recall of one predicate, as `mR@K` averages it.
    - `mR@K/GROUP`: the mean of `R@K/NAME` over a group of predicates.
    - `F@K`: the harmonic mean of R@K and mR@K.
    - `A@K` (only "predcls" and "sgcls"): the share of all relations of the data set that are found if only annotated
      pairs are ranked. Scene-Graph-Benchmark and RelDN call it "accuracy".

    The state consists of sums in float64. Its size does not depend on the data set, and the states of several processes
    or files can be added.

    Args:
        protocol: the task. It determines what the model was given of the ground truth: boxes and labels with "predcls",
            boxes with "sgcls", nothing with "sgdet" and "phrdet". "phrdet" compares the smallest boxes around both
            objects.
        num_predicates: number of predicates without the background.
        top_k: the values of K.
        zero_shot: int64 `[Z, 3]`, subject class, predicate, object class of the zero-shot triplets. If None, there is
            no `zR@K` and no `ng-zR@K`.
        groups: predicates by group name, as `predicate_groups` returns them. If None, there is no `mR@K/GROUP`.
        predicate_names: `num_predicates + 1` different names, background first. If None, there is no `R@K/NAME`.
        missing: treatment of images that have relations but no predictions. "zero" counts them as 0. "skip" ignores
            them, as the public code does.
        plus_one: if True, coordinates are pixel indices, and a box is x2 - x1 + 1 wide, as in Fast R-CNN's code and all
            published figures. If False, it is x2 - x1 wide.
        strict_constraint: if True, metrics with the graph constraint count only the best triplet of each pair (subject
            index, object index). The others are removed before the first K are taken. This changes predictions with
            `triplets` that list a pair several times, and predictions whose `pairs` have repeated rows. The metrics
            with `ng` do not change.
    """

    images: Tensor
    recalls: Tensor
    zero_shot_images: Tensor
    zero_shot_recalls: Tensor
    predicate_images: Tensor
    predicate_recalls: Tensor
    predicate_relations: Tensor
    predicate_found: Tensor
    accuracy_found: Tensor

    _settings = ("protocol", "num_predicates", "top_k", "missing", "plus_one", "zero_shot", "strict_constraint")

    def __init__(
        self,
        protocol: str,
        num_predicates: int,
        *,
        top_k: Sequence[int] = (20, 50, 100),
        zero_shot: Tensor | None = None,
        groups: Mapping[str, Sequence[int]] | None = None,
        predicate_names: Sequence[str] | None = None,
        missing: Literal["zero", "skip"] = "zero",
        plus_one: bool = True,
        strict_constraint: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        if num_predicates < 1:
            raise InputError(f"num_predicates must be at least 1, got {num_predicates}")
        if predicate_names is not None and not (
            len(predicate_names) == len(set(predicate_names)) == num_predicates + 1
        ):
            raise InputError(
                f"predicate_names must be {num_predicates + 1} different names, background first, got {predicate_names}"
            )
        if missing not in ("zero", "skip"):
            raise InputError(f"missing must be 'zero' or 'skip', got {missing!r}")
        for name, predicates in (groups or {}).items():
            if not predicates:
                raise InputError(f"groups[{name!r}] must have at least one predicate, got none")
            check_range("", f"groups[{name!r}]", torch.tensor(predicates), 1, num_predicates)
        self.protocol = protocol
        self.num_predicates = num_predicates
        self.top_k = check_top_k(top_k)
        self.zero_shot = None if zero_shot is None else TripletSet("zero_shot", zero_shot)
        self.groups = {name: tuple(predicates) for name, predicates in (groups or {}).items()}
        self.predicate_names = None if predicate_names is None else list(predicate_names)
        self.missing, self.plus_one, self.strict_constraint = missing, plus_one, strict_constraint
        depths = len(top_k)
        # A leading dimension of 2 is for metrics with and without the graph constraint.
        for state, shape in (
            ("images", ()),
            ("recalls", (2, depths)),
            ("zero_shot_images", ()),
            ("zero_shot_recalls", (2, depths)),
            ("predicate_images", (num_predicates,)),
            ("predicate_recalls", (2, depths, num_predicates)),
            ("predicate_relations", (num_predicates,)),
            ("predicate_found", (depths, num_predicates)),
            ("accuracy_found", (depths,)),
        ):
            self.add_state(state, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _check(self, where: str, prediction: Mapping[str, Any], target: Mapping[str, Any]) -> None:
        super()._check(where, prediction, target)
        if self.protocol not in ("predcls", "sgcls") or not _predicts(prediction):
            return
        given = ("boxes", "labels") if self.protocol == "predcls" else ("boxes",)
        for field in given:
            ours, theirs = prediction[field], target[field].to(prediction[field])
            # The tolerance is for boxes that were scaled and scaled back.
            if ours.shape != theirs.shape or not torch.allclose(ours.double(), theirs.double(), rtol=0, atol=0.5):
                raise InputError(
                    f"{where}prediction {field} must equal the target's, in the same order, for {self.protocol}"
                )

    def _add(self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        relations = target["relations"]
        if not len(relations) or (self.missing == "skip" and not _predicts(prediction)):
            return
        counting = first_of_pairs(prediction) if self.strict_constraint else None
        found = torch.stack(
            [self._found(prediction, target, 1, counting), self._found(prediction, target, self.num_predicates)]
        )
        predicate = relations[:, 2] - 1
        count = torch.bincount(predicate, minlength=self.num_predicates).double()
        by_predicate = torch.zeros_like(self.predicate_recalls).index_add_(2, predicate, found)
        self.images += 1
        self.recalls += found.mean(2)
        self.predicate_images += count > 0
        self.predicate_recalls += by_predicate / count.clamp(min=1)
        self.predicate_relations += count
        self.predicate_found += by_predicate[0]
        if self.zero_shot is not None:
            unseen = self.zero_shot.has_relations(target)
            if unseen.any():
                self.zero_shot_images += 1
                self.zero_shot_recalls += found[:, :, unseen].mean(2)
        if self.protocol in ("predcls", "sgcls"):
            related = (pairs_of(prediction)[:, None] == relations[:, :2]).all(2).any(1)
            among = related if counting is None else related & counting
            self.accuracy_found += self._found(prediction, target, 1, among).sum(1)

    def _found(
        self, prediction: Mapping[str, Tensor], target: Mapping[str, Tensor], at_most: int, among: Tensor | None = None
    ) -> Tensor:
        """Return 1 for each relation that the first K triplets find and 0 for the others, float64 `[len(top_k), M]`."""
        triplets = rank_triplets(prediction, max(self.top_k), at_most, among)
        finds = (
            relation_overlaps(triplets, prediction, target, phrase=self.protocol == "phrdet", plus_one=self.plus_one)
            >= 0.5
        )
        return torch.stack([finds[:k].any(0) for k in self.top_k]).double()

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as fractions, float64. All are 0 before the first image with relations."""
        recall = self.recalls / self.images.clamp(min=1)
        zero_shot = self.zero_shot_recalls / self.zero_shot_images.clamp(min=1)
        by_predicate = self.predicate_recalls / self.predicate_images.clamp(min=1)
        pooled = self.predicate_found / self.predicate_relations.clamp(min=1)
        accuracy = self.accuracy_found / self.predicate_relations.sum().clamp(min=1)
        result = {}
        for row, k in enumerate(self.top_k):
            mean = by_predicate[:, row].mean(1)
            result[f"R@{k}"], result[f"ngR@{k}"] = recall[:, row]
            result[f"mR@{k}"], result[f"ng-mR@{k}"] = mean
            result[f"mR_pooled@{k}"] = pooled[row].mean()
            result[f"F@{k}"] = 2 * recall[0, row] * mean[0] / (recall[0, row] + mean[0]).clamp(min=1e-300)
            if self.zero_shot is not None:
                result[f"zR@{k}"], result[f"ng-zR@{k}"] = zero_shot[:, row]
            if self.protocol in ("predcls", "sgcls"):
                result[f"A@{k}"] = accuracy[row]
            for name, predicates in self.groups.items():
                result[f"mR@{k}/{name}"] = by_predicate[0, row, [predicate - 1 for predicate in predicates]].mean()
            for name, value in zip((self.predicate_names or [])[1:], by_predicate[0, row], strict=False):
                result[f"R@{k}/{name}"] = value
        return result


def _predicts(prediction: Mapping[str, Any]) -> bool:
    return len(pairs_of(prediction)) > 0
