"""Controls for the ablation studies, which are variants of Align-Motifs that lack or change a part of the method."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sgalign.data import GraphBatch
from sgalign.errors import InputError
from sgalign.ops.alignment import relation_alignment_loss
from sgalign.training.align_motifs import AlignMotifsModule
from sgalign.training.motifs import MotifsModule
from sgalign.training.starting import ClassRows


class PredClsControl(AlignMotifsModule):
    """The base class of the controls that compute only relation losses.

    Args:
        options: the fields of `AlignMotifsOptions`.

    Raises:
        ValueError: if the protocol is not predcls. The other protocols decode object classes, which need a loss, too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if self.protocol != "predcls":
            raise InputError(f"protocol must be 'predcls' for {type(self).__name__}, got {self.protocol!r}")


class MaskedMotifsModule(PredClsControl):
    """Motifs trained only on input that is masked as in the mirror of Align-Motifs. The mask acts as a kind of dropout.

    It uses the mirror's options `mask_ratio` and `mask_granularity`, and ignores the mirror's other options.
    """

    def make_network(self, counts: Tensor) -> None:
        MotifsModule.make_network(self, counts)  # skips the mirror's head, which would get no gradient

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the supervised loss of the masked branch, and a dict with this loss as its only part."""
        seen, _, masked_logits = self.both_branches(batch, batch_index, self.network.predicate)
        loss, labelled = self.relation_loss(masked_logits, seen.graph.targets)
        loss = loss * self.share(labelled)
        return loss, {"loss": loss}


class AveragedTeacherModule(PredClsControl):
    """Align-Motifs with a mean teacher, which is an exponential moving average of the weights (decay 0.99).

    The mirror is aligned with the predictions of the teacher. It uses the mirror's options `mask_ratio`,
    `mask_granularity`, `tied_head` and `alignment_weight`, and ignores the mirror's other options. The alignment loss
    is always the mean over relations and classes of KL(teacher, mirrored).
    """

    class_rows: ClassVar[ClassRows] = {"teacher": None, **MotifsModule.class_rows}

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True).requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.teacher.n_averaged == 0:  # initial weights were loaded only into the network
            self.teacher.module.load_state_dict(self.network.state_dict())

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss to minimize and its parts by name. The part `alignment` is logged without its weight."""
        seen, prediction, mirrored_logits = self.both_branches(batch, batch_index, self.mirrored_head)
        teacher = self.teacher.eval()(seen).logits
        loss, parts = self.supervised_loss(prediction, seen.graph)
        parts["alignment"] = relation_alignment_loss(teacher, mirrored_logits) * self.share(len(seen.graph.pairs))
        return loss + self.options.alignment_weight * parts["alignment"], parts

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Do the step, and add its weights to the average before any callback can save a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.teacher.update_parameters(self.network)


class GrowingMaskModule(AlignMotifsModule):
    """Align-Motifs with a mask ratio that grows linearly from 0 in the first step to `mask_ratio` after the last."""

    @property
    def mask_ratio(self) -> float:
        """The masking probability in this step."""
        return self.options.mask_ratio * self.global_step / self.trainer.estimated_stepping_batches
