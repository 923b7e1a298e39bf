"""The object detector, torchvision's Faster R-CNN with FPN, and the outputs that relation models need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, ResNeXt101_32X8D_Weights
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image
from torchvision.ops.poolers import initLevelMapper

from sgalign.data.transfer import send
from sgalign.errors import InputError, shown
from sgalign.files import read_tensors
from sgalign.models.precision import widened
from sgalign.ops._operands import accumulated_dtype

BACKBONES = {
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V2,
    "resnext101_32x8d": ResNeXt101_32X8D_Weights.IMAGENET1K_V2,
}


LEVELS = {"0": 1 / 4, "1": 1 / 8, "2": 1 / 16, "3": 1 / 32}  # names and scales of the pyramid levels P2 to P5


def pyramid_pool(resolution: int) -> MultiScaleRoIAlign:
    """Return a RoIAlign that pools each box to `resolution` x `resolution` bins, from the level that fits its size."""
    pool = MultiScaleRoIAlign(list(LEVELS), resolution, sampling_ratio=2)
    # If these are not set, torchvision guesses the scales from the first images, and guesses wrongly if the images are
    # thin.
    pool.scales, pool.map_levels = list(LEVELS.values()), initLevelMapper(2, 5)
    return pool


class ImageFeatures(NamedTuple):
    """The backbone's features of B images."""

    levels: dict[str, Tensor]  # levels "0" to "3" and "pool" of the FPN, each [B, 256, h, w]
    images: ImageList  # resized images, padded to one size, and their sizes (height, width) without padding
    original_sizes: list[tuple[int, int]]  # height, width of the original images

    def resized(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Scale the boxes `[N, 4]` of each image from pixels of the original image to pixels of the resized image."""
        now, original = torch.tensor(self.images.image_sizes).float(), torch.tensor(self.original_sizes).float()
        # All scales go to the device in one copy. torchvision's function makes four tensors per image, and the host
        # waits for the GPU each time.
        scales = send((now / original).flip(1).repeat(1, 2), self.images.tensors.device)
        return [of_image * scale for of_image, scale in zip(boxes, scales, strict=True)]


class ObjectDetections(NamedTuple):
    """The objects found in one image, highest score first.

    Boxes are x1, y1, x2, y2 in pixels of the original image.
    """

    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N]
    logits: Tensor  # float32 [N, num_classes]
    boxes_per_class: Tensor  # float32 [N, num_classes, 4]


class Detector(nn.Module):
    """Faster R-CNN (Ren et al., NeurIPS 2015) with a feature pyramid.

    Args:
        num_classes: number of object classes, including the background (0).
        backbone: "resnet18", "resnet50" or "resnext101_32x8d" (the published one).
        min_size, max_size: side lengths in pixels. Images are resized to a short side of `min_size`, or less if their
            long side would exceed `max_size`.
        head_dim: number of channels of the box head. It is 4096 as published, and 1024 in torchvision's weights.
        trains_norms: if True, batch normalization is trained, for a detector that starts from scratch. Otherwise it
            keeps the statistics of the loaded weights, which suits small batches.
        box_score_threshold, nms_threshold, detections_per_image: settings of `detect`. The defaults are the public
            code's values.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: str = "resnet50",
        min_size: int = 600,
        max_size: int = 1000,
        head_dim: int = 1024,
        trains_norms: bool = False,
        box_score_threshold: float = 0.01,
        nms_threshold: float = 0.3,
        detections_per_image: int = 80,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise InputError(f"backbone must be one of {', '.join(map(repr, BACKBONES))}, got {backbone!r}")
        if num_classes < 2:
            raise InputError(f"num_classes must be at least 2, background included, got {num_classes}")
        self.backbone_name, self.num_classes, self.head_dim = backbone, num_classes, head_dim
        self.box_score_threshold, self.nms_threshold = box_score_threshold, nms_threshold
        self.detections_per_image = detections_per_image
        # With trainable_layers=5, all layers of the backbone are trained with the detector.
        norm = nn.BatchNorm2d if trains_norms else FrozenBatchNorm2d
        body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm, trainable_layers=5)
        head = TwoMLPHead(body.out_channels * 7**2, head_dim), FastRCNNPredictor(head_dim, num_classes)
        parts = {"box_roi_pool": pyramid_pool(7), "box_head": head[0], "box_predictor": head[1]}
        self.model = FasterRCNN(body, min_size=min_size, max_size=max_size, **parts)
        default = self.model.rpn.anchor_generator
        self.model.rpn.anchor_generator = _Anchors(default.sizes, default.aspect_ratios)
        # torchvision computes scores and boxes in the dtype of these layers' outputs.
        proposes, classifies = self.model.rpn.head, self.model.roi_heads.box_predictor
        for layer in (proposes.cls_logits, proposes.bbox_pred, classifies.cls_score, classifies.bbox_pred):
            layer.register_forward_hook(_widen)
        self.frozen = False

    def freeze(self) -> None:
        """Turn off gradients and stay in evaluation mode, even if the surrounding module is set to training mode."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Detector:
        return super().train(mode and not self.frozen)

    def load_weights(self, source: str) -> None:
        """Load the weights of a detector.

        Args:
            source: "torchvision" or a file. "torchvision" downloads torchvision's weights. For "resnet50" it downloads
                a detector trained on COCO, whose last layer is loaded only if its number of classes is the same. For
                the other backbones it downloads a backbone trained on ImageNet. A file contains the state_dict of this
                module, or is a checkpoint of `sgalign fit` that includes a detector.

        Raises:
            FileNotFoundError: if the file does not exist.
            ValueError: if the file holds anything else, or tensors of other shapes. The message says what is wrong.
        """
        if source == "torchvision":
            self._download()
            return
        self.load_state(self.state_in(read_tensors(source, "file of detector weights"), source), source)

    @staticmethod
    def state_in(read: Any, source: str) -> dict[str, Tensor]:
        """Return the state_dict of a detector in the content of a file.

        Args:
            read: the state_dict of a detector, or of a Lightning module that includes a detector, or a checkpoint of
                such a module.
            source: the name of the file, for error messages.

        Raises:
            ValueError: if the content does not map names to tensors.
        """
        state = read.get("state_dict", read) if isinstance(read, dict) else read
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise InputError(f"{source}: must map names to the weights of a detector, got {shown(state)}")
        for prefix in ("vision.detector.", "network."):  # in checkpoints of MotifsModule and of DetectorModule
            if any(name.startswith(prefix + "model.") for name in state):
                state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise InputError(f"{source}: must map names to the weights of a detector, but {others[0]!r} is no tensor")
        return state

    def load_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Load a state_dict of this module.

        Args:
            state: the state_dict.
            source: the name of its file or folder, for error messages.

        Raises:
            ValueError: if the tensors do not fit this detector. The message says which.
        """
        try:
            for name, own in self.state_dict().items():
                if name in state and state[name].is_floating_point() != own.is_floating_point():
                    raise RuntimeError(f"{name} has type {state[name].dtype} instead of {own.dtype}")
            self.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(
                f"{source}: must hold a detector with backbone {self.backbone_name!r}, head_dim {self.head_dim} and "
                f"{self.num_classes} classes, background included, got other weights: {reason}"
            ) from error

    def _download(self) -> None:
        if self.backbone_name == "resnet50":
            weights: Any = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
            state, target = _without_epsilon(weights.get_state_dict(progress=True)), self.model
        else:
            weights = BACKBONES[self.backbone_name]
            state, target = weights.get_state_dict(progress=True), self.model.backbone.body
        known = target.state_dict()
        fitting = {name: value for name, value in state.items() if name in known and value.shape == known[name].shape}
        target.load_state_dict(fitting, strict=False)

    def features(self, images: Sequence[Tensor]) -> ImageFeatures:
        """Compute the backbone's features of images.

        Args:
            images: `[3, H, W]` each, float32 in 0 to 1. Sizes may differ.

        Raises:
            ValueError: if an image's long side is more than `max_size` times its short side. The short side would be
                resized to less than one pixel.
        """
        for image in images:
            if max(image.shape[1:]) > self.model.transform.max_size * min(image.shape[1:]):
                ratio = f"a long side of at most {self.model.transform.max_size} times the short side"
                raise InputError(f"images must have {ratio}, got {image.shape[2]} x {image.shape[1]} pixels")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            original = [(image.shape[1], image.shape[2]) for image in images]
            resized, _ = self.model.transform(list(images))
            return ImageFeatures(self.model.backbone(resized.tensors), resized, original)

    @torch.no_grad()
    def detect(self, features: ImageFeatures) -> list[ObjectDetections]:
        """Detect the objects of each image, as the public code does.

        Detections are selected in four steps:

        - All boxes with a class score above `box_score_threshold` are candidates for that class.
        - Non-maximum suppression in each class removes candidates with an IoU above `nms_threshold`.
        - Each proposal keeps only its best remaining class.
        - The best `detections_per_image` are kept.

        Raises:
            ValueError: if a computed value is not finite. Without this check no object would be found, as in an empty
                image.
        """
        proposals, _ = self.model.rpn(features.images, features.levels)
        logits, boxes = self._box_head(features, proposals)
        computed = (*features.levels.values(), logits, boxes)
        # The region proposal network drops proposals that are not finite. An image without proposals therefore shows
        # that values were not finite.
        if not all(map(len, proposals)) or not torch.stack([part.isfinite().all() for part in computed]).all():
            raise InputError(
                "outputs of the detector must be finite, got infinity or NaN: check the images and the weights"
            )
        counts = [len(p) for p in proposals]
        images = zip(logits.split(counts), boxes.split(counts), features.original_sizes, features.images.image_sizes)
        return [self._filter(*image) for image in images]

    def _box_head(self, features: ImageFeatures, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return class logits `[P, num_classes]` and decoded boxes `[P, num_classes, 4]` for given boxes.

        All boxes are in pixels of the resized images.
        """
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(features.levels, boxes, features.images.image_sizes)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return logits, heads.box_coder.decode(deltas, boxes).reshape(-1, self.num_classes, 4)

    def _filter(
        self, logits: Tensor, boxes: Tensor, original: tuple[int, int], size: tuple[int, int]
    ) -> ObjectDetections:
        boxes = clip_boxes_to_image(boxes, size)
        scores = logits.softmax(1)
        proposal, label = (scores[:, 1:] > self.box_score_threshold).nonzero(as_tuple=True)
        label = label + 1
        kept = batched_nms(boxes[proposal, label], scores[proposal, label], label, self.nms_threshold)
        proposal, label = proposal[kept], label[kept]
        # Candidates are sorted by score, so a proposal's first candidate has its best class.
        earlier = torch.full((len(logits),), len(proposal), device=logits.device)
        place = torch.arange(len(proposal), device=logits.device)
        earlier.scatter_reduce_(0, proposal, place, "amin")
        first = (earlier[proposal] == place).nonzero()[: self.detections_per_image, 0]
        proposal, label = proposal[first], label[first]
        boxes_per_class = resize_boxes(boxes[proposal].reshape(-1, 4), list(size), list(original))
        boxes_per_class = boxes_per_class.reshape(-1, self.num_classes, 4)
        row = torch.arange(len(label), device=label.device)
        return ObjectDetections(
            boxes_per_class[row, label], label, scores[proposal, label], logits[proposal], boxes_per_class
        )

    @torch.no_grad()
    def classify(self, features: ImageFeatures, boxes: Sequence[Tensor]) -> Tensor:
        """Return the class logits `[T, num_classes]` of given boxes, as SGCls needs.

        Args:
            features: features of the images.
            boxes: `[N, 4]` for each image, in pixels of the original image.
        """
        return self._box_head(features, features.resized(boxes))[0]

    def losses(self, images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return torchvision's training losses by name.

        Args:
            images: `[3, H, W]` each, float32 in 0 to 1.
            boxes: `[N, 4]` for each image, in pixels of the original image.
            labels: int64 `[N]` for each image, from 1.
        """
        targets = [{"boxes": b, "labels": of} for b, of in zip(boxes, labels, strict=True)]
        return self.model(list(images), targets)


class _Anchors(AnchorGenerator):
    """Anchors that are in float32 even if the feature maps are in bfloat16.

    In bfloat16, coordinates above 512 pixels would be multiples of 4.
    """

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(accumulated_dtype(dtype), device)


def _widen(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Return a layer's output in float32, or as it is if it has float64."""
    return widened(output)


def _without_epsilon(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with 1e-5 subtracted from all running variances.

    torchvision trained its detector with an epsilon of 0 in batch normalization. Here the epsilon is 1e-5.
    """
    return {name: value - 1e-5 if name.endswith("running_var") else value for name, value in state.items()}
