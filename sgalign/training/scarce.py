"""Data sets with training labels that are partly removed or wrong, for the studies of scarce annotations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sgalign.data import GraphBatch, SceneGraph
from sgalign.data.splits import SPLITS
from sgalign.errors import InputError
from sgalign.training.datamodule import SceneGraphData


class ScarceData(SceneGraphData):
    """A data set with a degraded training split. The degradation is the same in every run.

    Args:
        root: as in `SceneGraphData`.
        labelled: share of the training images that keep their relations.
        unlabelled: if True, also train on the other images, but without their labels. If False, leave them out.
        missing: share of the relations to remove, as if they were not annotated. Images that lose all relations are
            left out.
        wrong: share of the relations whose predicate is replaced by the predicate of a random training relation.
        data: the other arguments of `SceneGraphData`.

    Raises:
        ValueError: if a share is not in [0, 1], or if a split has no relations.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        labelled: float = 1.0,
        unlabelled: bool = True,
        missing: float = 0.0,
        wrong: float = 0.0,
        **data: Any,
    ) -> None:
        for name, share in (("labelled", labelled), ("missing", missing), ("wrong", wrong)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} must be a share in [0, 1], got {share}")
        super().__init__(root, **data)
        generator = torch.Generator().manual_seed(0)
        for name in ("predicate_groups", "zero_shot_validation", "zero_shot_test"):
            getattr(self, name)  # computed from the full training split, so all runs are evaluated in the same way
        for split in SPLITS:
            self.require_relations(split)
        graphs = self.train
        order = torch.randperm(len(graphs), generator=generator).tolist()
        cut = round(labelled * len(graphs))
        predicates = torch.cat([graph.relations for graph in graphs])[:, 2]
        self.unlabelled = (
            [replace(graphs[i], relations=graphs[i].relations[:0]) for i in order[cut:]] if unlabelled else []
        )
        kept = []
        for index in sorted(order[:cut]):
            relations = graphs[index].relations.clone()
            other = predicates[torch.randint(len(predicates), (len(relations),), generator=generator)]
            is_wrong = torch.rand(len(relations), generator=generator) < wrong
            relations[is_wrong, 2] = other[is_wrong]
            relations = relations[torch.rand(len(relations), generator=generator) >= missing]
            if len(relations):
                kept.append(replace(graphs[index], relations=relations))
        # Modules choose their training images from the degraded ones.
        self.annotated = kept
        self.__dict__.pop("train", None)

    def training_graphs(self) -> list[SceneGraph]:
        """Return the images that an epoch reads. Images without labels, if there are any, are mixed with the others."""
        return [*self.train, *self.unlabelled]

    def _training_collate_fn(self) -> Callable[..., GraphBatch]:
        ids = {graph.image_id for graph in self.unlabelled}
        return partial(_collate_without_labels, self._collate_fn(), ids) if ids else self._collate_fn()


def _collate_without_labels(collate: Any, ids: set[str], graphs: Sequence[SceneGraph]) -> GraphBatch:
    """Return a batch whose images in `ids` have target rows of 0, which the supervised loss ignores."""
    batch = collate(graphs)
    labelled = torch.tensor([image_id not in ids for image_id in batch.image_ids])
    return batch._replace(targets=batch.targets * labelled[batch.images[batch.pairs[:, 0]], None])
