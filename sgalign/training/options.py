"""The options of the modules, as dataclasses that validate themselves.

To add a module, write an options dataclass. In the module's `__init__`, pass an instance of it to the `__init__` of a
parent class, in one of two forms:

- `super().__init__(XOptions(**options))`, if the parent's `__init__` takes an options object;
- `Grandparent.__init__(self, XOptions(**options))`, if the parent's `__init__` would build its own options, which lack
  the new fields. For example, `AlignMotifsModule` skips `MotifsModule.__init__`, which would build `MotifsOptions`.

The module then takes its options as plain arguments. The command line parses the source code of `__init__` and follows
this call to the dataclass. There it finds the names, types, defaults and help texts of the options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from sgalign.errors import InputError
from sgalign.models.entity_detector import Backbone
from sgalign.models.graph_assembly import PAIRS
from sgalign.numbers import LARGEST_WHOLE
from sgalign.ops.alignment import Direction, Reduction
from sgalign.training.longtail import PredicateWeights

VISIONS = {"predcls": ("none", "cached", "images"), "sgcls": ("cached", "images"), "sgdet": ("images",)}
ALIGNED = ("predicates", "subjects", "objects", "boxes")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base class of options. It checks the fields of type `Literal`; subclasses check the others.

    A whole number becomes a `float` if the field is one.

    `fixed` names the options that a checkpoint fixes, with one of three reasons. All other options can change.

    - "network": the option determines what the weights compute. No command accepts another value than the checkpoint's.
    - "training": the state of the optimizer depends on the option. A run cannot resume with another value.
    - "start": the option names a file that only a new run reads. A run resumes with the same name or with None.
    """

    fixed: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), get_args(hint))
            if hint is float and type(value := getattr(self, name)) is int and abs(value) < LARGEST_WHOLE:
                object.__setattr__(self, name, float(value))


@dataclass(frozen=True, kw_only=True)
class FasterRCNNOptions(Options):
    """Sizes of Faster R-CNN, the object detector of Motifs.

    Args:
        backbone: backbone of the detector. The published one is "resnext101_32x8d".
        min_size: length of the short side that images are resized to, in pixels.
        max_size: largest length of the long side of resized images, in pixels.
        head_dim: channels of the box head. The published number is 4096, and torchvision's weights have 1024.
    """

    fixed: ClassVar[dict[str, str]] = {"backbone": "network", "head_dim": "network"}

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
        weights: source of the initial weights (see `sgalign.training.starting.load_detector`). It is read when
            training starts. Classes that it lacks start anew. If None, the detector starts from scratch, and batch
            normalization is trained too.
        learning_rate: learning rate of Adam.
    """

    fixed: ClassVar[dict[str, str]] = FasterRCNNOptions.fixed | {"weights": "training"}  # None trains the norms

    weights: str | None = None
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_learning_rate(self, "learning_rate")


@dataclass(frozen=True, kw_only=True)
class StartOptions(Options):
    """The option of all relation models that lets a new run start from another model.

    Args:
        start_from: checkpoint, folder or name of a model whose weights a new run starts from (see `source` of
            `sgalign.training.checkpoints.read_checkpoint`). Its classes may differ: classes of the same name keep their
            weights, and the others start anew. It is read when training starts.
    """

    fixed: ClassVar[dict[str, str]] = {"start_from": "start"}

    start_from: str | None = None


@dataclass(frozen=True, kw_only=True)
class MotifsOptions(FasterRCNNOptions, StartOptions):
    """Options of Neural Motifs and its training.

    Args:
        protocol: "predcls" (boxes and classes are given), "sgcls" (boxes are given) or "sgdet" (nothing is given).
        vision: source of visual features. "none" uses only boxes and classes. "cached" reads features that
            `sgalign cache-features` wrote. "images" uses a frozen detector and trains extractors of region features
            with `relation_dim` channels.
        embed_dim: channels of a class embedding.
        hidden_dim: channels of each direction of both LSTMs, and of the contexts.
        relation_dim: channels of a pair's features, and of an object's visual features.
        word_vectors: text file of word vectors that initialize the class embeddings. Each vector must have `embed_dim`
            numbers. If None, the embeddings are initialized at random. The file is read when training starts, not when
            a checkpoint is loaded.
        detections_per_image: largest number of detected objects per image (SGDet).
        detector_weights: source of the detector's weights (see `sgalign.training.starting.load_detector`). It is read
            when training starts. Except under PredCls, it must know all object classes of the data. If None, and if
            `start_from` has no detector either, the detector is random, which is useful only for tests.
        relations_per_image: largest number of pairs sampled per training image. Related pairs make up at most a quarter
            of this number, as in the public code.
        optimizer: "adam" or "sgd". The published optimizer is "sgd", with momentum 0.9 and weight decay 1e-4 (none for
            biases). With "sgd" the learning rate falls to a tenth after three epochs without a better validation R@100.
        learning_rate: learning rate. If `learning_rate_images` is given, it is scaled in proportion to the number of
            images per step, counted over all processes.
        learning_rate_images: number of images per step for which `learning_rate` is given. If None, the learning rate
            does not depend on the batch size.
        warmup_steps: number of steps in which the learning rate grows from a tenth to its full value.
        predicate_weights: weights of predicates in the loss. See `weights` of `sgalign.training.longtail.RelationLoss`.
        predicate_weight_power: exponent of "inverse_frequency". See `power` of `RelationLoss`.
        effective_number_beta: beta of "effective_number". See `beta` of `RelationLoss`.
        logit_adjustment: tau of the logit adjustment in training. See `adjustment` of `RelationLoss`.
        logit_adjustment_test: tau of the logit adjustment at evaluation. See `adjustment_test` of `RelationLoss`.
        compile: if true, compile the relation head with `torch.compile` in `sgalign fit`, validation included.
    """

    fixed: ClassVar[dict[str, str]] = (
        FasterRCNNOptions.fixed
        | StartOptions.fixed
        | dict.fromkeys(("vision", "embed_dim", "hidden_dim", "relation_dim"), "network")
        | dict.fromkeys(("optimizer", "warmup_steps"), "training")
        | dict.fromkeys(("word_vectors", "detector_weights"), "start")
    )

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
    """Options of DETR and its training. The defaults are for DETR trained alone.

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
        detector_weights: source of the detector's initial weights. It is a folder or name of weights (see `weights` of
            `sgalign.models.entity_detector.EntityDetector`), or a checkpoint or exported folder of
            `EntityDetectorModule` or SGTR. The weights determine the detector's sizes, so they are read when the
            network is built. They are not read when a checkpoint of this module is loaded. Classes that they lack start
            anew, unless the whole detector is frozen. SGTR's subject and object heads start as copies of the detector's
            heads.
        frozen: parts of the detector that are not trained, any of "backbone", "encoder" and "decoder". If the decoder
            is frozen, the relation losses do not reach the detector. The detector's own losses still train its input
            projection, queries and heads, as in the public code. SGTR also takes "detector", which freezes the whole
            detector and is the cheapest.
        entity_loss_weights: weights of the detector's three losses, for classes, L1 distance of boxes and generalized
            IoU of boxes. They are the same in all decoder layers.
        short_sides: lengths of the short side of training images in pixels. One is drawn for each batch. Validation and
            test images are resized to the last one.
        long_side: largest length of the long side of images in pixels.
        padded_size: smallest height and width to which images are padded at evaluation. A model that was trained on
            small images in padded batches finds less in images without padding. If all images fit into this size, the
            results of an image do not depend on the other images of its batch.
        flip: probability of flipping a training image horizontally. In a flipped image, a predicate with "left" in its
            name is replaced by its counterpart with "right", and the reverse.
        learning_rate: learning rate of AdamW, with a weight decay of 1e-4.
        backbone_learning_rate: learning rate of the backbone.
        warmup_steps: number of steps in which the learning rate grows from a tenth to its full value.
        learning_rate_drops: steps at which the learning rate falls to a tenth of its value.
    """

    fixed: ClassVar[dict[str, str]] = (
        dict.fromkeys(("backbone", "stride", "dim", "heads", "ffn_dim", "entity_layers", "entity_queries"), "network")
        | dict.fromkeys(("frozen", "warmup_steps"), "training")
        | {"detector_weights": "start"}
    )
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
    padded_size: Sequence[int] = (0, 0)
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
            raise InputError(f"entity_loss_weights must be 3 numbers, for classes, boxes and overlaps, got {weights}")
        if len(self.padded_size) != 2 or min(self.padded_size) < 0:
            raise InputError(f"padded_size must be a height and a width of at least 0, got {list(self.padded_size)}")
        if not self.short_sides or min(self.short_sides) < 32 or self.long_side < max(self.short_sides):
            raise InputError(
                "short_sides must be at least 32 and at most long_side, "
                f"got {list(self.short_sides)} and {self.long_side}"
            )
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip must be in [0, 1], got {self.flip}")


@dataclass(frozen=True, kw_only=True)
class SGTROptions(DetrOptions, StartOptions):
    """Options of SGTR and its training, in addition to DETR's options.

    Args:
        protocol: "sgdet" or "predcls". With "predcls", graphs are assembled from the annotated boxes and classes
            instead of the detected entities, in training and evaluation.
        encoder_layers: number of layers of the predicate encoder.
        layers: number of layers of the structural decoder.
        queries: number of the decoder's relation queries per image.
        focal: if true, train predicates with the focal loss, as the public code does for Visual Genome. If false, train
            them with cross-entropy.
        distinct_matching: if true, give every annotated relation its own query, unlike the public code. See `distinct`
            of `sgalign.models.graph_assembly.match`.
        pairs: number of entity pairs that each query forms for each of its predicates at evaluation.
        compile: if true, compile everything after the detector, in both branches, with `torch.compile` in
            `sgalign fit`, validation included.
    """

    fixed: ClassVar[dict[str, str]] = (
        DetrOptions.fixed
        | StartOptions.fixed
        | dict.fromkeys(("encoder_layers", "layers", "queries", "focal"), "network")
    )
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
        reduction: reduction of the alignment loss. "element" takes the mean over relations and classes. "relation"
            takes the sum over classes and the mean over relations.
        direction: direction of the alignment loss. "teacher_to_student" is KL(supervised, mirrored). "symmetric" is the
            mean of KL(supervised, mirrored) and KL(mirrored, supervised).
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
        mask_granularity: unit of the mask. "row" masks whole objects, and "feature" masks single features of objects.
        tied_head: if true, the mirror shares the supervised predicate head. If false, it has its own.
        supervise_mirror: if true, add the supervised loss of the mirror's logits to the training loss.
    """

    fixed: ClassVar[dict[str, str]] = MotifsOptions.fixed | {"tied_head": "network"}

    mask_granularity: Literal["row", "feature"] = "row"
    tied_head: bool = False
    supervise_mirror: bool = False


@dataclass(frozen=True, kw_only=True)
class AlignSGTROptions(SGTROptions, MirrorOptions):
    """Options of SGTR, its mirror and their alignment.

    Args:
        aligned: outputs to align, one or more of "predicates", "subjects", "objects" and "boxes". "subjects" and
            "objects" are the class predictions.
        tied_heads: if true, the mirror shares the supervised class heads. If false, it has its own.
    """

    fixed: ClassVar[dict[str, str]] = SGTROptions.fixed | {"tied_heads": "network", "aligned": "training"}

    aligned: Sequence[str] = ("predicates", "subjects", "objects")
    tied_heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.aligned:
            check_choice("aligned", part, ALIGNED)
        if not self.aligned:
            raise InputError("aligned must name at least one output, got none")


def check_choice(name: str, choice: Any, choices: tuple[Any, ...]) -> None:
    """Raise InputError unless an option is one of its choices."""
    if choice not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")


def check_at_least(least: int, options: Options, *names: str) -> None:
    """Raise InputError unless the options of these names are finite and at least `least`, and whole ones below 2^31."""
    for name in names:
        value = getattr(options, name)
        below, what = (1 << 31, "below 2^31") if isinstance(value, int) else (float("inf"), "finite")
        if not least <= value < below:
            raise InputError(f"{name} must be at least {least} and {what}, got {value}")


def check_learning_rate(options: Options, name: str) -> None:
    """Raise InputError unless the option of this name is above 0 and below 1e30, so that steps fit into float32."""
    if not 0 < getattr(options, name) < 1e30:
        raise InputError(f"{name} must be above 0 and below 1e30, got {getattr(options, name)}")
