"""Options of the modules: dataclasses that check themselves.

A module takes them as plain arguments and hands them on, `super().__init__(XOptions(**options))`: from that the command
line finds their names, types, defaults and help texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sgalign.errors import InputError
from sgalign.training.longtail import PredicateWeights

VISIONS = {"predcls": ("none", "cached", "images"), "sgcls": ("cached", "images"), "sgdet": ("images",)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a module. Those whose type is a `Literal` are checked here, the others by each subclass."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))


@dataclass(frozen=True, kw_only=True)
class FasterRCNNOptions(Options):
    """Sizes of the Faster R-CNN that Motifs looks through.

    Args:
        backbone: the published one is "resnext101_32x8d".
        min_size: pixels of the short side that images are resized to.
        max_size: pixels of their long side, at most.
        head_dim: channels of the box head; 4096 as published, 1024 in torchvision's weights.
    """

    backbone: Literal["resnet18", "resnet50", "resnext101_32x8d"] = "resnet50"
    min_size: int = 600
    max_size: int = 1000
    head_dim: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "min_size", "max_size", "head_dim")


@dataclass(frozen=True, kw_only=True)
class MotifsOptions(FasterRCNNOptions):
    """Options of Neural Motifs and of its training.

    Args:
        protocol: "predcls" (boxes and classes are given), "sgcls" (boxes are given) or "sgdet" (nothing is).
        vision: what is seen of images. "none": nothing, boxes and classes are all; "cached": features that
            `sgalign cache-features` wrote; "images": a detector, which is not trained, and region features of
            `relation_dim` channels, which are.
        embed_dim: channels of a class embedding.
        hidden_dim: channels of each direction of both LSTMs, and of the contexts.
        relation_dim: channels of a pair's features, and of what is seen of an object.
        word_vectors: text file of word vectors of `embed_dim` numbers, the class embeddings' initial values; None for
            random ones. Read when training starts, not when a checkpoint is loaded.
        detections_per_image: objects that the detector finds in an image, at most (SGDet).
        detector_weights: as `weights` of `sgalign.models.Detector`, read when training starts.
        relations_per_image: pairs sampled in training, a quarter of them related, as in the public code.
        optimizer: "adam", or "sgd" as published: momentum 0.9, weight decay 1e-4 but for biases, a tenth of the
            learning rate after three epochs without a better validation R@100.
        learning_rate: for batches of `learning_rate_images` images over all processes, and in proportion for others.
        learning_rate_images: None for a learning rate that no batch size changes.
        warmup_steps: over which the learning rate grows from a tenth.
        predicate_weights: as `weights` of `sgalign.training.longtail.RelationLoss`.
        predicate_weight_power: as `power` of `RelationLoss`.
        effective_number_beta: as `beta` of `RelationLoss`.
        logit_adjustment: as `adjustment` of `RelationLoss`.
        logit_adjustment_test: as `adjustment_test` of `RelationLoss`.
    """

    protocol: Literal["predcls", "sgcls", "sgdet"] = "predcls"
    vision: Literal["none", "cached", "images"] = "none"
    embed_dim: int = 200
    hidden_dim: int = 128
    relation_dim: int = 512
    word_vectors: str | None = None
    detections_per_image: int = 80
    detector_weights: str | None = None
    relations_per_image: int = 1024
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    learning_rate_images: int | None = None
    warmup_steps: int = 0
    predicate_weights: PredicateWeights = "none"
    predicate_weight_power: float = 0.5
    effective_number_beta: float = 0.999
    logit_adjustment: float = 0.0
    logit_adjustment_test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "embed_dim", "hidden_dim", "relation_dim", "relations_per_image")
        check_at_least(1, self, "detections_per_image")
        if self.learning_rate_images is not None:
            check_at_least(1, self, "learning_rate_images")
        check_at_least(0, self, "warmup_steps", "predicate_weight_power", "logit_adjustment", "logit_adjustment_test")
        check_learning_rate(self, "learning_rate")
        if not 0 <= self.effective_number_beta < 1:
            raise InputError(f"effective_number_beta must be in [0, 1), got {self.effective_number_beta}")
        if self.vision not in (visions := VISIONS[self.protocol]):
            raise InputError(f"vision must be {' or '.join(visions)} for {self.protocol}, got {self.vision!r}")


@dataclass(frozen=True, kw_only=True)
class MirrorOptions(Options):
    """Options of the mirrored branch that Align-Motifs and Align-SGTR share (Xu, Liao, Sigal, WACV 2024).

    Args:
        mask_ratio: p, the probability of masking.
        alignment_weight: lambda.
        reduction: of the alignment loss; "element" is the mean over relations and classes, "relation" over relations.
        direction: of the alignment loss; "teacher_to_student" is KL(supervised, mirrored), "symmetric" the mean with
            KL(mirrored, supervised).
    """

    mask_ratio: float = 0.1
    alignment_weight: float = 10.0
    reduction: Literal["element", "relation"] = "element"
    direction: Literal["teacher_to_student", "symmetric"] = "teacher_to_student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio <= 1:
            raise InputError(f"mask_ratio must be in [0, 1], got {self.mask_ratio}")
        check_at_least(0, self, "alignment_weight")


def check_choice(name: str, choice: Any, choices: tuple[Any, ...]) -> None:
    if choice not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")


def check_at_least(least: int, options: Options, *names: str) -> None:
    for name in names:
        if not least <= getattr(options, name) < float("inf"):
            raise InputError(f"{name} must be at least {least} and finite, got {getattr(options, name)}")


def check_learning_rate(options: Options, name: str) -> None:
    if not 0 < getattr(options, name) < float("inf"):
        raise InputError(f"{name} must be above 0 and finite, got {getattr(options, name)}")
