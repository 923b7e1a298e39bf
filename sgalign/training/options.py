"""The options of the modules, as dataclasses that validate themselves.

A module takes its options as plain arguments. Its `__init__` makes the dataclass inside a call of a parent's
`__init__`. The command line follows that call to find the names, types, defaults and help texts of the options. The
call has one of two forms:

- `super().__init__(XOptions(**options))`, if the parent's `__init__` takes an options object;
- `Grandparent.__init__(self, XOptions(**options))`, if the parent's `__init__` makes its own options, which have fewer
  fields. For example, `MotifsModule` is such a parent of `AlignMotifsModule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from sgalign.errors import InputError
from sgalign.models.entity_detector import Backbone
from sgalign.models.graph_assembly import PAIRS
from sgalign.ops.alignment import Direction, Reduction
from sgalign.training.longtail import PredicateWeights

VISIONS = {"predcls": ("none", "cached", "images"), "sgcls": ("cached", "images"), "sgdet": ("images",)}
ALIGNED = ("predicates", "subjects", "objects", "boxes")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base class of options. It checks the fields of type `Literal`; subclasses check the others."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))


@dataclass(frozen=True, kw_only=True)
class FasterRCNNOptions(Options):
    """Sizes of Faster R-CNN, the object detector of Motifs.

    Args:
        backbone: backbone of the detector. The published one is "resnext101_32x8d".
        min_size: length of the short side that images are resized to, in pixels.
        max_size: largest length of the long side of resized images, in pixels.
        head_dim: channels of the box head. The published number is 4096, and torchvision's weights have 1024.
    """

    backbone: Literal["resnet18", "resnet50", "resnext101_32x8d"] = "resnet50"
    min_size: int = 600
    max_size: int = 1000
    head_dim: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "min_size", "max_size", "head_dim")


@dataclass(frozen=True, kw_only=True)
class DetectorOptions(FasterRCNNOptions):
    """Options of Faster R-CNN and its training.

    Args:
        weights: initial weights, a source that `Detector.load_weights` takes. They are read when training starts. If
            None, the detector starts from scratch, and batch normalization is trained too.
        learning_rate: learning rate of Adam. Use ``--optimizer`` on the command line to choose another optimizer.
    """

    weights: str | None = None
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_learning_rate(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class MotifsOptions(FasterRCNNOptions):
    """Options of Neural Motifs and its training.

    Args:
        protocol: "predcls" (boxes and classes are given), "sgcls" (boxes are given) or "sgdet" (nothing is given).
        vision: source of visual features. "none" uses only boxes and classes. "cached" reads features that
            `sgalign cache-features` wrote. "images" uses a detector, which is not trained, and extractors of region
            features with `relation_dim` channels, which are trained.
        embed_dim: channels of a class embedding.
        hidden_dim: channels of each direction of both LSTMs, and of the contexts.
        relation_dim: channels of a pair's features, and of an object's visual features.
        word_vectors: text file of word vectors with `embed_dim` numbers each, the initial class embeddings. If None,
            they are random. The file is read when training starts, not when a checkpoint is loaded.
        detections_per_image: largest number of detected objects per image (SGDet).
        detector_weights: initial weights of the detector, a source that `sgalign.models.Detector.load_weights` takes.
            They are read when training starts. If None, the detector is random, which is useful only for tests.
        relations_per_image: number of pairs sampled per training image. At most a quarter of them are related, as in
            the public code.
        optimizer: "adam", or "sgd" as published, with momentum 0.9 and weight decay 1e-4 (none for biases). With "sgd"
            the learning rate falls to a tenth after three epochs without a better validation R@100.
        learning_rate: learning rate for `learning_rate_images` images per step. It is scaled in proportion to the
            images per step over all processes.
        learning_rate_images: images per step that `learning_rate` is meant for. If None, the learning rate does not
            depend on the batch size.
        warmup_steps: number of steps in which the learning rate grows from a tenth to its full value.
        predicate_weights: weights of predicates in the loss, as `weights` of `sgalign.training.longtail.RelationLoss`.
        predicate_weight_power: exponent of "inverse_frequency", as `power` of `RelationLoss`.
        effective_number_beta: beta of "effective_number", as `beta` of `RelationLoss`.
        logit_adjustment: tau of the logit adjustment in training, as `adjustment` of `RelationLoss`.
        logit_adjustment_test: tau of the logit adjustment at evaluation, as `adjustment_test` of `RelationLoss`.
        compile: compile the relation head with `torch.compile` in training.
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
    compile: bool = False

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
class DetrOptions(Options):
    """Options of DETR and its training. The defaults are those of DETR trained alone.

    Args:
        backbone: backbone of the detector. "resnet10" is a small one for experiments.
        stride: stride of the feature map in pixels. The published stride is 32. With 16 the backbone's last stage is
            left out.
        dim: channels of DETR's transformer and of SGTR's encoder and decoder.
        heads: number of attention heads in DETR and SGTR.
        ffn_dim: channels of the feed-forward layers in DETR and SGTR.
        dropout: dropout probability in DETR and SGTR, also for attention weights.
        entity_layers: number of layers of DETR's encoder, and of its decoder.
        entity_queries: number of DETR's object queries per image.
        detector_weights: initial weights of the detector, a folder or name that `weights` of `EntityDetector` takes, or
            a checkpoint of `EntityDetectorModule` or SGTR. They are read when the network is made, because they
            determine its sizes, but not when a checkpoint of this module is loaded. SGTR's subject and object heads
            start as copies of the detector's heads.
        frozen: parts of the detector that are not trained, any of "backbone", "encoder" and "decoder". With a frozen
            decoder the relation losses do not reach the detector. Its input projection, queries and heads are still
            trained with its own losses, as in the public code. SGTR also takes "detector", which freezes the whole
            detector and is the cheapest.
        entity_loss_weights: weights of the detector's losses of classes, box L1 and box generalized IoU, in all its
            layers.
        short_sides: lengths of the short side of training images in pixels. One is drawn for each step. Test images
            have the last one.
        long_side: largest length of the long side of images in pixels.
        flip: probability of mirroring a training image. Predicates with "left" and "right" in their names are then
            exchanged.
        learning_rate: learning rate of AdamW, with a weight decay of 1e-4.
        backbone_learning_rate: learning rate of the backbone.
        warmup_steps: number of steps in which the learning rate grows from a tenth to its full value.
        learning_rate_drops: steps at which the learning rate falls to a tenth of its value.
    """

    parts: ClassVar[tuple[str, ...]] = ("backbone", "encoder", "decoder")  # parts that can be frozen

    backbone: Backbone = "resnet101"
    stride: Literal[16, 32] = 32
    dim: int = 256
    heads: int = 8
    ffn_dim: int = 2048
    dropout: float = 0.1
    entity_layers: int = 6
    entity_queries: int = 100
    detector_weights: str | None = None
    frozen: Sequence[str] = ()
    entity_loss_weights: tuple[float, float, float] = (1.0, 5.0, 2.0)
    short_sides: Sequence[int] = (480, 500, 520, 540, 560, 580, 600)
    long_side: int = 1000
    flip: float = 0.5
    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    warmup_steps: int = 100
    learning_rate_drops: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.frozen:
            check_choice("frozen", part, self.parts)
        check_at_least(1, self, "dim", "heads", "ffn_dim", "entity_layers", "entity_queries")
        check_at_least(0, self, "warmup_steps")
        check_learning_rate(self, "learning_rate")
        check_learning_rate(self, "backbone_learning_rate")
        if self.dim % 4 or self.dim % self.heads:
            raise InputError(f"dim must be a multiple of 4 and of heads, got {self.dim} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout}")
        if len(self.entity_loss_weights) != 3:
            weights = list(self.entity_loss_weights)
            raise InputError(f"entity_loss_weights must be three, for classes, boxes and overlaps, got {weights}")
        if not self.short_sides or min(self.short_sides) < 32 or self.long_side < max(self.short_sides):
            raise InputError(
                "short_sides must be at least 32 and at most long_side, "
                f"got {list(self.short_sides)} and {self.long_side}"
            )
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip must be in [0, 1], got {self.flip}")


@dataclass(frozen=True, kw_only=True)
class SGTROptions(DetrOptions):
    """Options of SGTR and its training, besides those of DETR.

    Args:
        protocol: "sgdet" or "predcls". With "predcls" the annotated boxes and classes replace the detected entities
            when graphs are assembled, in training too.
        encoder_layers: number of layers of the predicate encoder.
        layers: number of layers of the structural decoder.
        queries: number of the decoder's relation queries per image.
        focal: train predicates with the focal loss, as the public code does for Visual Genome. If false, train them
            with cross-entropy.
        distinct_matching: give every annotated relation its own query, as `distinct` of
            `sgalign.models.graph_assembly.match`. The public code does not.
        pairs: number of entity pairs, best first, that a query joins with each of its predicates at evaluation.
        compile: compile everything after the detector, in both branches, with `torch.compile` in training.
    """

    parts: ClassVar[tuple[str, ...]] = (*DetrOptions.parts, "detector")

    protocol: Literal["sgdet", "predcls"] = "sgdet"
    encoder_layers: int = 3
    layers: int = 6
    queries: int = 180
    focal: bool = True
    distinct_matching: bool = False
    pairs: int = PAIRS
    compile: bool = False
    entity_loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    learning_rate: float = 8e-5
    backbone_learning_rate: float = 8e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, self, "layers", "queries", "pairs")
        check_at_least(0, self, "encoder_layers")


@dataclass(frozen=True, kw_only=True)
class MirrorOptions(Options):
    """Options of the mirrored branch that Align-Motifs and Align-SGTR share (Xu, Liao, Sigal, WACV 2024).

    Args:
        mask_ratio: masking probability, p in the paper.
        alignment_weight: weight of the alignment loss, lambda in the paper.
        reduction: reduction of the alignment loss. "element" is the mean over relations and classes, "relation" the
            mean over relations.
        direction: direction of the alignment loss. "teacher_to_student" is KL(supervised, mirrored). "symmetric" is
            its mean with KL(mirrored, supervised).
    """

    mask_ratio: float = 0.1
    alignment_weight: float = 10.0
    reduction: Reduction = "element"
    direction: Direction = "teacher_to_student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_ratio <= 1:
            raise InputError(f"mask_ratio must be in [0, 1], got {self.mask_ratio}")
        check_at_least(0, self, "alignment_weight")


@dataclass(frozen=True, kw_only=True)
class AlignMotifsOptions(MotifsOptions, MirrorOptions):
    """Options of Motifs, its mirror and their alignment.

    Args:
        mask_granularity: unit of the mask. "row" masks whole objects, "feature" single features of them.
        tied_head: let the mirror share the supervised predicate head. If false, it has its own.
        supervise_mirror: add the supervised loss of the mirror's logits.
    """

    mask_granularity: Literal["row", "feature"] = "row"
    tied_head: bool = False
    supervise_mirror: bool = False


@dataclass(frozen=True, kw_only=True)
class AlignSGTROptions(SGTROptions, MirrorOptions):
    """Options of SGTR, its mirror and their alignment.

    Args:
        aligned: outputs to align, one or more of "predicates", "subjects" and "objects" (their classes) and "boxes".
        tied_heads: let the mirror share the supervised class heads. If false, it has its own.
    """

    aligned: Sequence[str] = ("predicates", "subjects", "objects")
    tied_heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.aligned:
            check_choice("aligned", part, ALIGNED)
        if not self.aligned:
            raise InputError("aligned must have at least one part, got none")


def check_choice(name: str, choice: Any, choices: tuple[Any, ...]) -> None:
    """Raise InputError unless an option is one of its choices."""
    if choice not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")


def check_at_least(least: int, options: Options, *names: str) -> None:
    """Raise InputError unless the options of these names are finite and at least `least`."""
    for name in names:
        if not least <= getattr(options, name) < float("inf"):
            raise InputError(f"{name} must be at least {least} and finite, got {getattr(options, name)}")


def check_learning_rate(options: Options, name: str) -> None:
    """Raise InputError unless the option of this name is finite and above 0."""
    if not 0 < getattr(options, name) < float("inf"):
        raise InputError(f"{name} must be above 0 and finite, got {getattr(options, name)}")
