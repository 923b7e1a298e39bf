"""Features of objects and of pairs of objects in images: the region and union features of Neural Motifs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import roi_align

from sgalign.data.transfer import send
from sgalign.models.detector import LEVELS, Detector, ImageFeatures, pyramid_pool

CHANNELS = 256  # number of channels of the feature pyramid
BINS = 7  # number of bins per side of a pooled region
RECTANGLES = 27  # number of bins per side of the subject's and the object's mask
PAIRS_AT_ONCE = 1024  # number of pairs per chunk at evaluation


class RegionFeatures(nn.Module):
    """The two extractors of Scene-Graph-Benchmark's relation head, one for objects and one for pairs. Both are trained.

    Args:
        dim: number of channels of the features. It is 4096 as published.
    """

    def __init__(self, *, dim: int = 4096) -> None:
        super().__init__()
        self.pool = pyramid_pool(BINS)
        self.object_head = TwoMLPHead(CHANNELS * BINS**2, dim)
        self.union_reduce = nn.Conv2d(CHANNELS * len(LEVELS), CHANNELS, 3, padding=1)
        self.rectangles = nn.Sequential(
            nn.Conv2d(2, CHANNELS // 2, 7, stride=2, padding=3),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(CHANNELS // 2, momentum=0.01),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(CHANNELS // 2, CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.BatchNorm2d(CHANNELS, momentum=0.01),
        )
        self.union_head = TwoMLPHead(CHANNELS * BINS**2, dim)

    def load_box_head(self, detector: Detector) -> None:
        """Initialize the layers of both extractors from the detector's box head, wherever the shapes are equal."""
        state = detector.model.roi_heads.box_head.state_dict()
        for head in (self.object_head, self.union_head):
            own = head.state_dict()
            head.load_state_dict({name: v for name, v in state.items() if v.shape == own[name].shape}, strict=False)

    def objects(self, features: ImageFeatures, boxes: Sequence[Tensor]) -> Tensor:
        """Return the features `[T, dim]` of the boxes `[N, 4]` of each image, in pixels of the original image."""
        resized = features.resized(boxes)
        return self.object_head(self.pool(features.levels, resized, features.images.image_sizes))

    def pairs(self, features: ImageFeatures, boxes: Sequence[Tensor], pairs: Sequence[Tensor]) -> Tensor:
        """Return the union features `[R, dim]` of pairs.

        The box around both objects is pooled from every level of the pyramid. Then the output of a small convolutional
        network on two 27 x 27 masks is added. The masks cover the whole image and mark the subject's and the object's
        box with 1.

        Args:
            features: features of the images.
            boxes: `[N, 4]` for each image, in pixels of the original image.
            pairs: int64 `[R, 2]` for each image, subject and object as row numbers of the image's boxes.
        """
        resized = features.resized(boxes)
        ends = [of_image[pair] for of_image, pair in zip(resized, pairs, strict=True)]  # [R, 2, 4]
        images = [e.new_full((len(e), 1), image) for image, e in enumerate(ends)]
        sizes = torch.tensor(features.images.image_sizes).float().flip(1).repeat(1, 2)
        relative = torch.cat([e / size for e, size in zip(ends, send(sizes, features.images.tensors.device))])
        both = torch.cat(ends)
        around = torch.cat([torch.cat(images), both[..., :2].amin(1), both[..., 2:].amax(1)], 1)
        # Evaluation scores all pairs, thousands per image. Chunks limit the memory.
        step = len(around) if self.training else PAIRS_AT_ONCE
        parts = zip(around.split(max(step, 1)), relative.split(max(step, 1)))
        return torch.cat([self._union(features, regions, ends) for regions, ends in parts])

    def _union(self, features: ImageFeatures, regions: Tensor, ends: Tensor) -> Tensor:
        """Return the union features of regions.

        Args:
            features: features of the images.
            regions: `[R, 5]`, image index and box around both objects, in pixels of the resized image.
            ends: `[R, 2, 4]`, boxes of subject and object relative to the image size.
        """
        pooled = [roi_align(features.levels[name], regions, BINS, scale, 2) for name, scale in LEVELS.items()]
        visual = self.union_reduce(torch.cat(pooled, 1)).relu()
        return self.union_head(visual + self.rectangles(rectangle_masks(ends)))


def rectangle_masks(boxes: Tensor) -> Tensor:
    """Return masks of boxes, `[..., 27, 27]`, that are 1 in each bin that the box touches.

    Args:
        boxes: `[..., 4]`, x1, y1, x2, y2 relative to the image size.
    """
    low = (boxes[..., :2] * RECTANGLES).floor().clamp(0, RECTANGLES - 1)
    high = (boxes[..., 2:] * RECTANGLES).ceil().clamp(1, RECTANGLES)
    bins = torch.arange(RECTANGLES, device=boxes.device)
    inside = (bins >= low[..., None]) & (bins < torch.maximum(high, low + 1)[..., None])  # [..., 2, 27]: x, y
    return (inside[..., 1, :, None] & inside[..., 0, None, :]).to(boxes.dtype)
