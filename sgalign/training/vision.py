"""The visual input of Motifs. Each class turns a batch into objects, pairs and features in a different way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from sgalign.data import GraphBatch, Objects, SeenBatch, VisualFeatures
from sgalign.data.transfer import send
from sgalign.errors import InputError
from sgalign.models import Detector, ImageFeatures, ObjectDetections, RegionFeatures
from sgalign.training.options import MotifsOptions
from sgalign.training.sampling import match_detections, sample_pairs
from sgalign.training.starting import check_trained, load_detector


class Vision(nn.Module):
    """The base class of the visual inputs. Subclasses implement `forward`.

    Args:
        options: the options of Motifs.
    """

    def __init__(self, options: MotifsOptions) -> None:
        super().__init__()
        self.options = options

    def load_initial_weights(self, object_names: Sequence[str]) -> None:
        """Load pretrained weights into this module's networks, if it has networks.

        Args:
            object_names: the object classes, the background first.
        """

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        """Return the objects, pairs and features of the batch.

        Args:
            batch: the batch from the data.
            generator: random generator on the CPU. It is the only source of randomness for the pairs drawn in training.
        """
        raise NotImplementedError(f"{type(self).__name__} must override forward")

    def sample(self, batch: GraphBatch, generator: torch.Generator) -> GraphBatch:
        """Return the batch with at most `relations_per_image` pairs per image in training, and all at evaluation."""
        if not self.training:
            return batch
        rows = sample_pairs(
            batch.related,
            torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.pair_counts),
            limit=self.options.relations_per_image,
            generator=generator,
        )
        return batch if len(rows) == len(batch.pairs) else batch.keep_pairs(rows)


class BoxVision(Vision):
    """Boxes and classes only (`vision: none`)."""

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        return SeenBatch(self.sample(batch, generator))


class CachedVision(Vision):
    """Features that come with the data (`vision: cached`): from `sgalign cache-features`, or simulated ones."""

    source: str | None = None  # `features_source` of the data that the model was trained on

    def read_from(self, source: str | None) -> None:
        """Set the source of the features. The data and the checkpoint must have the same source."""
        if source is not None and self.source not in (None, source):
            raise InputError(
                f"the features of the data must be those that the model was trained on, {self.source}, got {source}: "
                "run sgalign cache-features with the same checkpoint, or simulate features with the same data.noise"
            )
        self.source = source or self.source

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        if batch.features is None:
            trained_on = "" if self.source is None else f" (the model was trained on {self.source})"
            raise InputError(
                "the data must have features for a model with vision 'cached', got none: set data.features to a folder "
                f"of sgalign cache-features, or data to the class of the training run{trained_on}"
            )
        if (dim := batch.features.objects.shape[1]) != self.options.relation_dim:
            raise InputError(
                f"relation_dim must be {dim}, as in the features of the data, got {self.options.relation_dim}"
            )
        batch = self.sample(batch, generator)
        return SeenBatch(batch, batch.features)


class ImageVision(Vision):
    """A frozen detector and trainable extractors of region features (`vision: images`).

    Under PredCls only the detector's backbone is used, because boxes and classes are given.

    Args:
        options: the options of Motifs.
        num_classes: number of object classes, the background included.
    """

    def __init__(self, options: MotifsOptions, num_classes: int) -> None:
        super().__init__(options)
        self.detector = Detector(
            num_classes,
            backbone=options.backbone,
            min_size=options.min_size,
            max_size=options.max_size,
            head_dim=options.head_dim,
            detections_per_image=options.detections_per_image,
        )
        self.detector.freeze()
        self.regions = RegionFeatures(dim=options.relation_dim)

    def load_initial_weights(self, object_names: Sequence[str]) -> None:
        source = self.options.detector_weights
        if source is not None:
            new = load_detector(self.detector, source, object_names)
            if self.options.protocol != "predcls":  # PredCls uses only the backbone
                check_trained("detector_weights", source, new, "--config configs/faster_rcnn.yaml --model.weights")
            self.regions.load_box_head(self.detector)
        elif self.options.start_from is None:
            rank_zero_info(
                "detector_weights is null, so the frozen detector has random weights, which is useful only for tests"
            )

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        image = self.detector.features(batch.require_pixels())
        graph = self.sample(batch, generator)
        return SeenBatch(graph, self.extract(graph, image))

    def extract(self, graph: GraphBatch, image: ImageFeatures, logits: Tensor | None = None) -> VisualFeatures:
        """Return the extracted features of the graph's objects and pairs, together with the detector's logits."""
        boxes = graph.boxes_by_image()
        objects = self.regions.objects(image, boxes)
        return VisualFeatures(objects, self.regions.pairs(image, boxes, graph.pairs_by_image()), logits)


class ClassifyingVision(ImageVision):
    """`ImageVision` with a detector that classifies the given boxes (SGCls)."""

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        image = self.detector.features(batch.require_pixels())
        logits = self.detector.classify(image, batch.boxes_by_image())
        graph = self.sample(batch, generator)
        return SeenBatch(graph, self.extract(graph, image, logits))


class DetectingVision(ImageVision):
    """`ImageVision` with a detector that finds the objects (SGDet). In training, annotated boxes are added to them."""

    def forward(self, batch: GraphBatch, generator: torch.Generator) -> SeenBatch:
        image = self.detector.features(batch.require_pixels())
        found = self.detector.detect(image)
        if self.training:
            found = self._with_annotated(found, batch, image)
        graph = with_detections(batch, found)
        if self.training:
            graph = self._matched(graph, generator)
        features = self.extract(graph, image, torch.cat([objects.logits for objects in found]))
        boxes_per_class = None if self.training else torch.cat([objects.boxes_per_class for objects in found])
        return SeenBatch(graph, features, boxes_per_class)

    def _with_annotated(
        self, found: Sequence[ObjectDetections], batch: GraphBatch, image: ImageFeatures
    ) -> list[ObjectDetections]:
        """Append each image's annotated objects to its detections, with logits from the detector."""
        lengths = batch.lengths.tolist()
        logits = self.detector.classify(image, batch.boxes_by_image())
        boxes_per_class = batch.boxes[:, None].expand(-1, logits.shape[1], -1)  # the same box for every class
        fields = batch.boxes, batch.labels, batch.scores, logits, boxes_per_class
        annotated = zip(*(field.split(lengths) for field in fields), strict=True)
        return [ObjectDetections(*map(torch.cat, zip(*both))) for both in zip(found, annotated, strict=True)]

    def _matched(self, graph: GraphBatch, generator: torch.Generator) -> GraphBatch:
        """Return the graph of detections with sampled pairs and with training targets for pairs and objects."""
        matched = [
            match_detections(
                boxes,
                truth["boxes"],
                truth["labels"],
                truth["relations"],
                generator=generator,
                limit=self.options.relations_per_image,
                num_predicates=graph.targets.shape[1] - 1,
            )
            for boxes, truth in zip(graph.boxes.cpu().split(graph.lengths.tolist()), graph.truth, strict=True)
        ]
        pairs, targets, labels = zip(*matched, strict=True)
        pairs_of_all = [of_image + start for of_image, start in zip(pairs, graph.starts.tolist(), strict=True)]
        device, target = graph.boxes.device, torch.cat(targets)
        return graph._replace(
            pair_counts=torch.tensor([len(of_image) for of_image in pairs]),
            related=target[:, 1:].any(1),
            pairs=send(torch.cat(pairs_of_all), device),
            targets=send(target, device),
            labels=send(torch.cat(labels), device),
        )


def with_detections(batch: GraphBatch, found: Sequence[ObjectDetections]) -> GraphBatch:
    """Return the batch with the detected objects in place of the annotated ones.

    It has all ordered pairs of the detected objects, target rows of 0, and no cached features.
    """
    objects = Objects.of(torch.tensor([len(image.boxes) for image in found]), batch.boxes.device)
    return batch._replace(
        **objects._asdict(),
        related=torch.zeros(len(objects.pairs), dtype=torch.bool),
        boxes=torch.cat([image.boxes for image in found]),
        labels=torch.cat([image.labels for image in found]),
        scores=torch.cat([image.scores for image in found]),
        targets=batch.targets.new_zeros(len(objects.pairs), batch.targets.shape[1]),
        features=None,
    )


def make_vision(options: MotifsOptions, num_classes: int) -> Vision:
    """Return the visual input that the options choose.

    Args:
        options: the options of Motifs.
        num_classes: number of object classes, the background included.
    """
    if options.vision == "none":
        return BoxVision(options)
    if options.vision == "cached":
        return CachedVision(options)
    kinds = {"predcls": ImageVision, "sgcls": ClassifyingVision, "sgdet": DetectingVision}
    return kinds[options.protocol](options, num_classes)
