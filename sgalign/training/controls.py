"""Controls of the studies: data made worse, and variants of Align-Motifs without a part of the method."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sgalign.data import GraphBatch, SceneGraph
from sgalign.errors import InputError
from sgalign.ops.alignment import relation_alignment_loss
from sgalign.training.align_motifs import AlignMotifsModule
from sgalign.training.datamodule import SceneGraphData


class ScarceData(SceneGraphData):
    """A data set whose training part is made worse, the same way in every run.

    Args:
        root: of `SceneGraphData`.
        features: name of a folder in `root` that `sgalign cache-features` has filled.
        labelled: share of the training images that keep their relations.
        unlabelled: whether the others are trained on without labels, or not at all.
        missing: share of the relations that were not annotated.
        wrong: share of the relations whose predicate is another relation's.
        data: the arguments of `SceneGraphData`.

    Raises:
        ValueError: there are features, but no root that they could be in.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        features: str | None = None,
        labelled: float = 1.0,
        unlabelled: bool = True,
        missing: float = 0.0,
        wrong: float = 0.0,
        **data: Any,
    ) -> None:
        if features is not None and root is None:
            raise InputError(f"data must be a folder with cached features in {features}/, got the generated scenes")
        super().__init__(root, features=features and str(Path(root or "", features)), **data)
        generator = torch.Generator().manual_seed(0)
        for name in ("predicate_groups", "zero_shot_validation", "zero_shot_test"):
            getattr(self, name)  # cached before the training part is made worse, so that all runs have the same figures
        for part in ("train", "validation", "test"):
            if not any(len(graph.relations) for graph in getattr(self, part)):
                raise InputError(f"{self.name}: must have relations in its {part} part, has none")
        graphs = self.train
        order = torch.randperm(len(graphs), generator=generator).tolist()
        cut = round(labelled * len(graphs))
        predicates = torch.cat([graph.relations for graph in graphs])[:, 2]
        self.unlabelled = [_with(graphs[i], graphs[i].relations[:0]) for i in order[cut:]] if unlabelled else []
        self.train = []
        for index in sorted(order[:cut]):
            relations = graphs[index].relations.clone()
            other = predicates[torch.randint(len(predicates), (len(relations),), generator=generator)]
            is_wrong = torch.rand(len(relations), generator=generator) < wrong
            relations[is_wrong, 2] = other[is_wrong]
            relations = relations[torch.rand(len(relations), generator=generator) >= missing]
            if len(relations):
                self.train.append(_with(graphs[index], relations))

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        loader = super().train_dataloader()
        if not self.unlabelled:
            return loader
        sampler = torch.utils.data.RandomSampler(
            range(len(self.train) + len(self.unlabelled)), generator=torch.Generator().manual_seed(self.seed)
        )
        ids = {graph.image_id for graph in self.unlabelled}
        loader = self._loader([*self.train, *self.unlabelled], sampler=sampler)
        loader.collate_fn = partial(_collate_without_labels, loader.collate_fn, ids)
        return loader


def _with(graph: SceneGraph, relations: Tensor) -> SceneGraph:
    return SceneGraph(graph.image_id, graph.width, graph.height, graph.boxes, graph.labels, relations, graph.image)


def _collate_without_labels(collate: Any, ids: set[str], graphs: Sequence[SceneGraph]) -> GraphBatch:
    """Return a batch where images of `ids` have no target: rows of 0, which the supervised loss does not count."""
    batch = collate(graphs)
    labelled = torch.tensor([image_id not in ids for image_id in batch.image_ids])
    return batch._replace(targets=batch.targets * labelled[batch.images[batch.pairs[:, 0]], None])


class MaskedMotifsModule(AlignMotifsModule):
    """A control: Motifs trained on what a mirror would see, without the other branch.

    Of the mirror's options `mask_ratio` counts.
    """

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen, _, masked_logits = self.both_branches(batch, batch_index, self.network.predicate)
        loss, _ = self.relation_loss(masked_logits, seen.graph.targets)
        return loss, {"loss": loss}


class AveragedTeacherModule(AlignMotifsModule):
    """A control: the mirror is aligned with what an average of earlier weights predicts (mean teacher).

    Of the mirror's options `mask_ratio` and `alignment_weight` count.
    """

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True).requires_grad_(False)

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen, prediction, mirrored_logits = self.both_branches(batch, batch_index, self.mirrored_head)
        teacher = self.teacher.eval()(seen).logits
        loss, parts = self.supervised_loss(prediction, seen.graph)
        parts["alignment"] = relation_alignment_loss(teacher, mirrored_logits)
        return loss + self.options.alignment_weight * parts["alignment"], parts

    def on_train_batch_end(self, *args: Any) -> None:
        self.teacher.update_parameters(self.network)


class GrowingMaskModule(AlignMotifsModule):
    """A curriculum: p grows from 0 to its value from the first step to the last."""

    @property
    def mask_ratio(self) -> float:
        return self.options.mask_ratio * self.global_step / self.trainer.estimated_stepping_batches
