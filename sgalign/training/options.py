"""Options of the modules: dataclasses that check themselves.

A module takes them as plain arguments and makes them in its `__init__`, in a call of a parent's: the command line
follows that call, and finds names, types, defaults and help texts of the options. It has one of two forms:

- `super().__init__(XOptions(**options))`, where the parent takes options as they are made;
- `Grandparent.__init__(self, XOptions(**options))`, where the parent, such as `MotifsModule` for `AlignMotifsModule`,
  would make options of its own, which know fewer of them.
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
class DetectorOptions(FasterRCNNOptions):
    """Options of the Faster R-CNN and of its training.

    Args:
        weights: of `Detector.load_weights`, read when training starts; None starts from scratch, and then batch
            normalisation is trained too.
        learning_rate: of Adam. Another optimizer: ``--optimizer`` of the command line.
    """

    weights: str | None = None
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_learning_rate(self, "learning_rate")


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
        compile: training compiles the relation head with `torch.compile`.
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
    """Options of DETR and of its training; the defaults are those of DETR trained by itself.

    Args:
        backbone: "resnet10" is a small one for experiments.
        stride: of the feature map in pixels, 32 as published, or 16 by leaving out the backbone's last stage.
        dim: channels of the transformer, and of SGTR's encoder and decoder.
        heads: attention heads in all of them.
        ffn_dim: channels of the feed-forward layers in all of them.
        dropout: in all of them, of attention weights too.
        entity_layers: layers of DETR's encoder, and of its decoder.
        entity_queries: objects that DETR finds in an image.
        detector_weights: as `weights` of `EntityDetector`, or a checkpoint of `EntityDetectorModule` or of SGTR. Read
            when the network is made, because they tell its sizes; not where a checkpoint of this module is loaded.
            SGTR's heads of subjects and objects start as the detector's.
        frozen: parts of the detector that are not trained: "backbone", "encoder", "decoder". With a frozen decoder
            nothing that is learned about relations changes what relations read of the detector. Input projection,
            queries and heads are still trained then, as in the public code; "detector", for SGTR, is all of it, and
            the cheapest.
        entity_loss_weights: of the detector's classes, box L1 and box generalised IoU, in all its layers.
        short_sides: of training images in pixels, one drawn for each step; test images have the last one.
        long_side: of images in pixels, at most.
        flip: probability of mirroring a training image; predicates of "left" and "right" are exchanged.
        learning_rate: of AdamW with a weight decay of 1e-4.
        backbone_learning_rate: of the backbone.
        warmup_steps: over which the learning rate grows from a tenth.
        learning_rate_drops: steps at which it falls to a tenth.
    """

    parts: ClassVar[tuple[str, ...]] = ("backbone", "encoder", "decoder")  # what can be frozen

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
            raise InputError(f"entity_loss_weights must be three, of classes, boxes and overlaps, got {weights}")
        if not self.short_sides or min(self.short_sides) < 32 or self.long_side < max(self.short_sides):
            raise InputError(
                "short_sides must be at least 32 and at most long_side, "
                f"got {list(self.short_sides)} and {self.long_side}"
            )
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip must be in [0, 1], got {self.flip}")


@dataclass(frozen=True, kw_only=True)
class SGTROptions(DetrOptions):
    """Options of SGTR and of its training, besides those of DETR.

    Args:
        protocol: "sgdet"; or "predcls", where the annotated boxes and classes take the place of the detected entities
            when graphs are assembled, in training too.
        encoder_layers: layers of the predicate encoder.
        layers: layers of the structural decoder.
        queries: relations that the decoder looks for in an image.
        focal: predicates are trained by a focal loss, as for Visual Genome; otherwise by cross-entropy.
        distinct_matching: as `distinct` of `sgalign.models.graph_assembly.match`; false as in the public code.
        pairs: of entities that a query and predicate may join at evaluation, best first.
        compile: training compiles what lies behind the detector, both branches, with `torch.compile`.
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
        mask_ratio: p, the probability of masking.
        alignment_weight: lambda.
        reduction: of the alignment loss; "element" is the mean over relations and classes, "relation" over relations.
        direction: of the alignment loss; "teacher_to_student" is KL(supervised, mirrored), "symmetric" the mean with
            KL(mirrored, supervised).
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
    """Options of Motifs, of its mirror, and of how both are aligned.

    Args:
        mask_granularity: "row" masks whole objects, "feature" single numbers of them.
        tied_head: the mirror has the supervised head instead of its own.
        supervise_mirror: adds the supervised loss of the mirror's logits.
    """

    mask_granularity: Literal["row", "feature"] = "row"
    tied_head: bool = False
    supervise_mirror: bool = False


@dataclass(frozen=True, kw_only=True)
class AlignSGTROptions(SGTROptions, MirrorOptions):
    """Options of SGTR, of its mirror, and of how both are aligned.

    Args:
        aligned: of "predicates", "subjects", "objects" (their classes) and "boxes".
        tied_heads: the mirror has the supervised class heads instead of its own.
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
    """Raise an error unless an option is one of its choices."""
    if choice not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")


def check_at_least(least: int, options: Options, *names: str) -> None:
    """Raise an error unless the options of these names are finite and at least `least`."""
    for name in names:
        if not least <= getattr(options, name) < float("inf"):
            raise InputError(f"{name} must be at least {least} and finite, got {getattr(options, name)}")


def check_learning_rate(options: Options, name: str) -> None:
    """Raise an error unless the option of this name is finite and above 0."""
    if not 0 < getattr(options, name) < float("inf"):
        raise InputError(f"{name} must be above 0 and finite, got {getattr(options, name)}")
