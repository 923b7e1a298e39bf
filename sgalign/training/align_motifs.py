"""Training of Align-Motifs."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from sgalign.data import GraphBatch, SeenBatch
from sgalign.models import Prediction
from sgalign.ops.alignment import relation_alignment_loss
from sgalign.ops.random_mask import random_attention_mask
from sgalign.training.base import SavedModule
from sgalign.training.motifs import MotifsModule
from sgalign.training.options import AlignMotifsOptions


class AlignMotifsModule(MotifsModule):
    """Align-Motifs (Xu, Liao, Sigal, WACV 2024): Motifs trained with a mirrored, masked branch.

    The loss is L = L_supervised + alignment_weight * L_align. The mirrored branch (the mirror) shares every weight
    except the predicate head. With `tied_head` it shares the head, too. A random part of the input of the mirror's edge
    context is set to 0. At evaluation there is no mirror, and `network` is plain Motifs. Where the paper states a
    value, it is the default. docs/training.md explains the other defaults.

    Args:
        options: the fields of `AlignMotifsOptions`.
    """

    options: AlignMotifsOptions
    options_type = AlignMotifsOptions

    def __init__(self, **options: Any) -> None:
        SavedModule.__init__(self, AlignMotifsOptions(**options))  # MotifsModule.__init__ would build MotifsOptions

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        self.mirrored_head = self.network.predicate if self.options.tied_head else self.network.new_predicate_head()

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimize and its parts by name. The part `alignment` is logged without its weight."""
        options = self.options
        seen, prediction, mirrored_logits = self.both_branches(batch, batch_index, self.mirrored_head)
        loss, parts = self.supervised_loss(prediction, seen.graph)
        alignment = relation_alignment_loss(
            prediction.logits, mirrored_logits, reduction=options.reduction, direction=options.direction
        )
        parts["alignment"] = alignment * self.share(len(seen.graph.pairs))
        loss = loss + options.alignment_weight * parts["alignment"]
        if options.supervise_mirror:
            mirrored_loss, labelled = self.relation_loss(mirrored_logits, seen.graph.targets)
            parts["mirror"] = mirrored_loss * self.share(labelled)
            loss = loss + parts["mirror"]
        return loss, parts

    def both_branches(
        self, batch: GraphBatch, batch_index: int, mirrored_head: nn.Linear
    ) -> tuple[SeenBatch, Prediction, Tensor]:
        """Return the inputs of the model, the supervised prediction and the mirror's logits."""
        seen = self.see(batch, batch_index)
        dropped = self.draw_mask(seen.graph, batch_index)
        return seen, *self.network.dual_branch(seen, mirrored_head, dropped=dropped)

    @property
    def mask_ratio(self) -> float:
        """The masking probability in this step."""
        return self.options.mask_ratio

    def draw_mask(self, batch: GraphBatch, batch_index: int) -> Tensor:
        """Draw this step's mask of the mirror's edge input. It uses `random_attention_mask`.

        Returns:
            bool `[T, 1]` for whole rows, `[T, F]` for single features. True means masked.
        """
        images, objects = len(batch.lengths), int(batch.lengths.max())
        seed, device = self.step_seed(batch_index), batch.boxes.device
        draw = partial(random_attention_mask, images, 1, ratio=self.mask_ratio, seed=seed, device=device)
        if self.options.mask_granularity == "row":
            return draw(1, objects)[batch.images, 0, 0, batch.positions, None]
        return draw(objects, self.network.edge_input_dim)[batch.images, 0, batch.positions]
