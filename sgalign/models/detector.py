"""The object detector: torchvision's Faster R-CNN with FPN, and what a relation model needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, ResNeXt101_32X8D_Weights
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, batched_nms, clip_boxes_to_image
from torchvision.ops.poolers import initLevelMapper

from sgalign.data.transfer import send
from sgalign.errors import InputError
from sgalign.files import read_tensors

BACKBONES = {
    "resnet18": ResNet18_Weights.IMAGENET1K_V1,
    "resnet50": ResNet50_Weights.IMAGENET1K_V2,
    "resnext101_32x8d": ResNeXt101_32X8D_Weights.IMAGENET1K_V2,
}


LEVELS = {"0": 1 / 4, "1": 1 / 8, "2": 1 / 16, "3": 1 / 32}  # P2 to P5, and their scales


def pyramid_pool(resolution: int) -> MultiScaleRoIAlign:
    """Pools `resolution` x `resolution` bins of each box from the level of the pyramid that suits its size."""
    pool = MultiScaleRoIAlign(list(LEVELS), resolution, sampling_ratio=2)
    # It would guess the scales from the first images, and wrongly from thin ones.
    pool.scales, pool.map_levels = list(LEVELS.values()), initLevelMapper(2, 5)
    return pool


class ImageFeatures(NamedTuple):
    """What the backbone sees of B images."""

    levels: dict[str, Tensor]  # the FPN's, "0" to "3" and "pool", each [B, 256, h, w]
    images: ImageList  # padded to one size, and the sizes (height, width) before
    original_sizes: list[tuple[int, int]]  # height, width of the images as they came

    def resized(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes `[N, 4]` of each image from its own pixels to those of the resized image."""
        now, original = torch.tensor(self.images.image_sizes).float(), torch.tensor(self.original_sizes).float()
        # In one copy; torchvision's function makes four tensors an image, for each of which a GPU is waited for.
        scales = send((now / original).flip(1).repeat(1, 2), self.images.tensors.device)
        return [of_image * scale for of_image, scale in zip(boxes, scales, strict=True)]


class ObjectDetections(NamedTuple):
    """The objects found in one image, by falling score; boxes are x1, y1, x2, y2 in the image's own pixels."""

    boxes: Tensor  # float32 [N, 4]
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N]
    logits: Tensor  # float32 [N, num_classes]
    boxes_per_class: Tensor  # float32 [N, num_classes, 4]


class Detector(nn.Module):
    """Faster R-CNN (Ren et al., NeurIPS 2015) with a feature pyramid.

    Args:
        num_classes: object classes, background (0) included.
        backbone: "resnet18", "resnet50" or "resnext101_32x8d" (the published one).
        min_size, max_size: images are resized so that their short side has `min_size` pixels and their long side at
            most `max_size`.
        head_dim: channels of the box head; 4096 as published, 1024 in torchvision's weights.
        trains_norms: batch normalisation learns, for a detector that starts from scratch; otherwise it stays as the
            weights have it, as small batches want.
        box_score_threshold, nms_threshold, detections_per_image: of `detect`; the public code's values.
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
        # All layers of the backbone are trained where the detector is.
        norm = nn.BatchNorm2d if trains_norms else FrozenBatchNorm2d
        body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm, trainable_layers=5)
        head = TwoMLPHead(body.out_channels * 7**2, head_dim), FastRCNNPredictor(head_dim, num_classes)
        parts = {"box_roi_pool": pyramid_pool(7), "box_head": head[0], "box_predictor": head[1]}
        self.model = FasterRCNN(body, min_size=min_size, max_size=max_size, **parts)
        self.frozen = False

    def freeze(self) -> None:
        """No gradients, and evaluation mode whatever the module around it is set to."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Detector:
        return super().train(mode and not self.frozen)

    def load_weights(self, source: str) -> None:
        """Loads the weights of a detector.

        Args:
            source: "torchvision" downloads torchvision's: the detector trained on COCO for "resnet50", whose last layer
                of classes and boxes is left as it is, the ImageNet backbone for the others. Else a file: the state_dict
                of this module, or a checkpoint of `sgalign fit` with a detector in it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, or has other shapes; names them.
        """
        if source == "torchvision":
            self._download()
            return
        state = read_tensors(source, "file of detector weights")
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        for prefix in ("vision.detector.", "network."):  # of MotifsModule, of DetectorModule
            if any(str(name).startswith(prefix + "model.") for name in state):
                state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(
                f"{source}: must be of a detector with backbone {self.backbone_name!r}, head_dim {self.head_dim} and "
                f"{self.num_classes} classes, background included; {reason}"
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
        """Of images `[3, H, W]`, float32 in 0 to 1, of any sizes.

        Raises:
            ValueError: an image's long side is over `max_size` times its short one: resizing would leave nothing of it.
        """
        for image in images:
            if max(image.shape[1:]) > self.model.transform.max_size * min(image.shape[1:]):
                ratio = f"a long side of at most {self.model.transform.max_size} times the short one"
                raise InputError(f"images must have {ratio}, got one of {image.shape[2]} x {image.shape[1]} pixels")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            original = [(image.shape[1], image.shape[2]) for image in images]
            resized, _ = self.model.transform(list(images))
            return ImageFeatures(self.model.backbone(resized.tensors), resized, original)

    @torch.no_grad()
    def detect(self, features: ImageFeatures) -> list[ObjectDetections]:
        """The objects of each image, as the public code finds them.

        Of each class, boxes above `box_score_threshold` that no better one of the class covers by an IoU above
        `nms_threshold`; a proposal keeps its best class alone; at most `detections_per_image`, the best.

        Raises:
            ValueError: what it computes is not finite. Nothing would be found, as in an empty image.
        """
        proposals, _ = self.model.rpn(features.images, features.levels)
        logits, boxes = self._box_head(features, proposals)
        computed = (*features.levels.values(), logits, boxes)
        # The region proposal network drops what is not finite: of finite numbers it always leaves some.
        if not all(map(len, proposals)) or not torch.stack([part.isfinite().all() for part in computed]).all():
            raise InputError(
                "what the detector computes must be finite, got infinity or NaN: look at images and weights"
            )
        counts = [len(p) for p in proposals]
        images = zip(logits.split(counts), boxes.split(counts), features.original_sizes, features.images.image_sizes)
        return [self._filter(*image) for image in images]

    def _box_head(self, features: ImageFeatures, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits `[P, num_classes]` and boxes `[P, num_classes, 4]` for boxes in pixels of the resized images."""
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
        # By falling score: the first of a proposal is its best class.
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
        """Logits `[T, num_classes]` of given boxes, `[N, 4]` of each image in its own pixels (SGCls)."""
        return self._box_head(features, features.resized(boxes))[0]

    def losses(self, images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """torchvision's training losses, by name; boxes `[N, 4]` in pixels of their images, labels int64 `[N]`."""
        targets = [{"boxes": b, "labels": of} for b, of in zip(boxes, labels, strict=True)]
        return self.model(list(images), targets)


def _without_epsilon(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision trained its detector with an epsilon of 0 in batch normalisation; here it is 1e-5."""
    return {name: value - 1e-5 if name.endswith("running_var") else value for name, value in state.items()}
