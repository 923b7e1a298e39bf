"""Training of Align-Motifs."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor

from sgalign.data import GraphBatch
from sgalign.ops.alignment import relation_alignment_loss
from sgalign.ops.random_mask import random_attention_mask
from sgalign.training.motifs import MotifsModule
from sgalign.training.options import alignment_weight, check_choice, check_mirror
from sgalign.training.sampling import step_seed


class AlignMotifsModule(MotifsModule):
    """Align-Motifs (Xu, Liao, Sigal, WACV 2024): Motifs trained with a mirrored, masked branch.

    L = L_supervised + alignment_weight * L_align, where the mirror shares every weight but its predicate head, and what
    its edge context reads is randomly set to 0. At evaluation the mirror does not exist: `network` is Motifs. The
    defaults are the paper's where it says something; docs/training.md has the reasons for the others.

    Args:
        mask_ratio: p, the probability of masking.
        alignment_weight: lambda.
        mask_granularity: "row" masks whole objects, "feature" single numbers of them, "union" the union features of
            whole pairs instead.
        tied_head: the mirror has the supervised head instead of its own.
        reduction, direction: of `relation_alignment_loss`.
        aligned_relations: "all" pairs, annotated ("foreground") ones, or those with a "masked" object or union.
        alignment_warmup: steps over which the weight grows from 0 to `alignment_weight`.
        supervise_mirror: adds the supervised loss of the mirror's logits.
        motifs: the arguments of `MotifsModule`.
    """

    def __init__(
        self,
        mask_ratio: float = 0.1,
        alignment_weight: float = 10.0,
        mask_granularity: Literal["row", "feature", "union"] = "row",
        tied_head: bool = False,
        reduction: Literal["element", "relation"] = "element",
        direction: Literal["teacher_to_student", "student_to_teacher", "symmetric"] = "teacher_to_student",
        aligned_relations: Literal["all", "foreground", "masked"] = "all",
        alignment_warmup: int = 0,
        supervise_mirror: bool = False,
        **motifs: Any,
    ) -> None:
        super().__init__(**motifs)
        check_mirror(self.options)
        check_choice("mask_granularity", mask_granularity, ("row", "feature", "union"))
        check_choice("aligned_relations", aligned_relations, ("all", "foreground", "masked"))

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        self.mirrored_head = self.network.predicate if self.options.tied_head else self.network.new_predicate_head()

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        options = self.options
        batch = self.see(batch, batch_index)
        dropped = self.draw_mask(batch, batch_index)
        mask = {"dropped_union" if options.mask_granularity == "union" else "dropped": dropped}
        prediction, mirrored_logits = self.network.dual_branch(batch, self.mirrored_head, **mask)
        loss, parts = self.supervised_loss(prediction, batch)
        weight = self._weights(batch, dropped)
        alignment = relation_alignment_loss(
            prediction.logits,
            mirrored_logits,
            reduction=options.reduction,
            direction=options.direction,
            weight=weight,
        )
        counted = len(batch.pairs) if weight is None else weight.sum().item()
        parts["alignment"] = alignment * self.share(counted)
        loss = loss + alignment_weight(options, self.global_step) * parts["alignment"]
        if options.supervise_mirror:
            mirrored_loss, labelled = self.relation_loss(mirrored_logits, batch.targets)
            loss = loss + mirrored_loss * self.share(labelled)
        return loss, parts

    @property
    def mask_ratio(self) -> float:
        """p of this step."""
        return self.options.mask_ratio

    def draw_mask(self, batch: GraphBatch, batch_index: int) -> Tensor:
        """What this step's mirror does not see, drawn as attention masks are: bool `[T, 1]` (row), `[T, F]` (feature)
        or `[R, 1]` (union)."""
        seed = step_seed(self.run_seed, self.global_step, batch_index, self.global_rank)
        images, objects = len(batch.lengths), int(batch.lengths.max())
        draw = partial(random_attention_mask, ratio=self.mask_ratio, seed=seed, device=batch.boxes.device)
        if self.options.mask_granularity == "row":
            return draw(images, 1, 1, objects)[batch.images, 0, 0, batch.positions, None]
        if self.options.mask_granularity == "feature":
            return draw(images, 1, objects, self.network.edge_input_dim)[batch.images, 0, batch.positions]
        subject, object_ = batch.positions[batch.pairs].unbind(1)
        return draw(images, 1, objects, objects)[batch.images[batch.pairs[:, 0]], 0, subject, object_, None]

    def _weights(self, batch: GraphBatch, dropped: Tensor) -> Tensor | None:
        if self.options.aligned_relations == "foreground":
            return batch.targets[:, 1:].sum(1)
        if self.options.aligned_relations == "masked":
            if self.options.mask_granularity == "union":
                return dropped[:, 0].float()
            return dropped.any(1)[batch.pairs].any(1).float()
        return None
