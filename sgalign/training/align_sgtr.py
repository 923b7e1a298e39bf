"""Training of Align-SGTR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgalign.models.entity_detector import DetectedEntities
from sgalign.models.sgtr import MirrorMask, RelationOutputs
from sgalign.ops.alignment import Kind, relation_alignment_loss
from sgalign.training.detr import DetrModule
from sgalign.training.options import AlignSGTROptions
from sgalign.training.sgtr import SGTRModule


class AlignSGTRModule(SGTRModule):
    """Align-SGTR (Xu, Liao, Sigal, WACV 2024): SGTR trained with a mirrored structural predicate decoder.

    The loss is L = L_supervised + alignment_weight * L_align. The mirrored branch (the mirror) shares every weight
    except the class heads of predicates, subjects and objects. With `tied_heads` it shares the heads, too. In the
    mirror, each cross-attention block of each layer draws its own mask of the attention matrix.

    L_align is a sum of one loss for each output that the option `aligned` names. The losses compare the outputs of the
    last layer. Predicates and the classes of subjects and objects use `relation_alignment_loss`. Its argument `kind` is
    "sigmoid" for predicates with the focal loss, and "softmax" otherwise. Boxes use the mean absolute difference. At
    evaluation there is no mirror.

    Args:
        options: the fields of `AlignSGTROptions`.
    """

    options: AlignSGTROptions
    options_type = AlignSGTROptions

    def __init__(self, **options: Any) -> None:
        DetrModule.__init__(self, AlignSGTROptions(**options))  # SGTRModule.__init__ would build SGTROptions

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        tied = self.network.predicate, self.network.entity_class
        self.mirrored_predicate, self.mirrored_class = tied if self.options.tied_heads else self.network.new_heads()
        if not self.options.tied_heads:  # DDP would wait for gradients of unaligned heads
            aligned = set(self.options.aligned)
            self.mirrored_predicate.requires_grad_("predicates" in aligned)
            self.mirrored_class.requires_grad_(not aligned.isdisjoint({"subjects", "objects"}))

    def decode(self, entities: DetectedEntities, batch_index: int) -> tuple[RelationOutputs, dict[str, Tensor]]:
        """Return the outputs of the supervised branch, and the weighted alignment losses by name.

        Align-Motifs logs its alignment loss without the weight.
        """
        # All blocks share one seed tensor, which is filled on the device. If the seed were a Python number, a compiled
        # network would treat it as a constant.
        seed = torch.full((), self.step_seed(batch_index), dtype=torch.int64, device=self.device)
        mask = MirrorMask(self.options.mask_ratio, seed)
        heads = self.mirrored_predicate, self.mirrored_class
        outputs, mirrored = self.network.dual_branch(entities.last(), heads, mask)
        parts = self.alignment(outputs.at(-1), mirrored)
        return outputs, {f"alignment {name}": self.options.alignment_weight * part for name, part in parts.items()}

    def alignment(self, outputs: RelationOutputs, mirrored: RelationOutputs) -> dict[str, Tensor]:
        """Return the unweighted alignment loss of each aligned output, by name."""
        options = self.options
        pairs: dict[str, tuple[Tensor, Tensor, Kind]] = {
            "predicates": (outputs.logits, mirrored.logits, "sigmoid" if options.focal else "softmax"),
            "subjects": (outputs.class_logits[0], mirrored.class_logits[0], "softmax"),
            "objects": (outputs.class_logits[1], mirrored.class_logits[1], "softmax"),
        }
        losses = {
            name: relation_alignment_loss(
                teacher.flatten(0, -2),
                student.flatten(0, -2),
                kind=kind,
                reduction=options.reduction,
                direction=options.direction,
            )
            for name, (teacher, student, kind) in pairs.items()
            if name in options.aligned
        }
        if "boxes" in options.aligned:
            losses["boxes"] = (outputs.boxes.detach() - mirrored.boxes).abs().mean()
        return losses
