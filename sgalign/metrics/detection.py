"""Mean average precision of detected objects, as COCO computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

MOST_DETECTIONS = 100  # of a class in an image
_FIGURES = {"mAP": "map", "mAP_50": "map_50", "mAP_75": "map_75", "mAR_100": "mar_100"}


class DetectionEvaluator(MeanAveragePrecision):
    """Mean average precision of detected objects by COCO's rules (Lin et al., "Microsoft COCO", ECCV 2014).

    A detection is right if it overlaps an annotated object of its class that no better detection claims. Average
    precision is the area under the curve of precision over recall, sampled at 101 points. At most `MOST_DETECTIONS`
    detections of a class count in an image, those with the highest scores. All annotated objects count, also crowds.

    `compute` returns these keys:

    - `mAP`: average precision, averaged over the IoU thresholds 0.5, 0.55, ..., 0.95 and over classes.
    - `mAP_50`, `mAP_75`: the same for one threshold.
    - `mAR_100`: the largest recall, averaged over thresholds and classes.
    - `AP/NAME`: average precision of one class, averaged over thresholds.

    Classes without annotated objects do not count and have no `AP/NAME`. Without any annotated object, there are no
    keys. The boxes of all images stay in the host's memory until `compute`.

    Args:
        object_names: class names, background first. If None, there is no `AP/NAME`.

    Raises:
        ModuleNotFoundError: if pycocotools is not installed.
    """

    warn_on_many_detections = False  # the command counts such images

    def __init__(self, object_names: Sequence[str] | None = None, **kwargs: Any) -> None:
        try:
            import pycocotools  # noqa: F401
        except ModuleNotFoundError as error:
            message = "average precision needs pycocotools: pip install 'sgalign[train]'"
            raise ModuleNotFoundError(message, name=error.name) from None
        super().__init__(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),  # torchmetrics rounds its own thresholds to float32
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            max_detection_thresholds=[1, 10, MOST_DETECTIONS],
            extended_summary=object_names is not None,
            **kwargs,
        )
        self.object_names = object_names

    def update(self, predictions: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images to the metric.

        Args:
            predictions: one dict per image, with `boxes` float `[N, 4]` (x1, y1, x2, y2 in pixels of the original
                image), `labels` int64 `[N]` from 1, and `scores` float `[N]`. Other fields are ignored.
            targets: one dict per image, with the annotated `boxes` and `labels`.
        """
        super().update(
            [_on_host(image, "boxes", "labels", "scores") for image in predictions],
            [_on_host(image, "boxes", "labels") for image in targets],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics as fractions."""
        found = super().compute()
        figures = {name: found[theirs] for name, theirs in _FIGURES.items()}
        if self.object_names is not None and "precision" in found:
            # Thresholds, points of recall, classes, areas (the first is all), limits of detections (the last is 100).
            precision = found["precision"][..., 0, -1].mean((0, 1))
            figures |= {f"AP/{self.object_names[i]}": value for i, value in zip(found["classes"], precision)}
        return {name: value for name, value in figures.items() if value >= 0}  # -1 if there are no annotated objects

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Join the images of all processes.

        torchmetrics would gather one tensor after the other, and wait forever if one process has more images.
        """
        own = {name: getattr(self, name) for name in self._defaults}
        parts: list[Any] = [None] * torch.distributed.get_world_size(process_group)
        torch.distributed.all_gather_object(parts, own, group=process_group)
        for name in own:
            setattr(self, name, [tensor for part in parts for tensor in part[name]])


def _on_host(image: Mapping[str, Any], *fields: str) -> dict[str, Tensor]:
    return {field: image[field].detach().cpu() for field in fields}
