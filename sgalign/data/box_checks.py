"""Checks that find boxes in the wrong unit or order. Such boxes are valid numbers, so no other check notices them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sgalign.data.findings import EXAMPLES, Findings
from sgalign.data.scene_graph import SceneGraph
from sgalign.errors import InputError, shown

CORNERS, EXTENTS = "x1, y1, x2, y2", "x, y, width, height"  # the meanings that the numbers of a box can have
LARGEST = 1 << 24  # largest coordinate, up to which float32 represents every integer
TOLERANCE = 1.0  # pixels, because some data sets count a box's last pixel and others do not
MANY = 0.25  # share of boxes beyond their images that a few careless annotations do not explain
SHRUNK = 0.7  # median reach of predicted boxes; a detector that works finds some object near the farthest edge
NEARLY_ALL = 0.95  # share of boxes that must fit another order of the numbers before it is named as the cause


def check_box(where: str, box: Any, order: str) -> None:
    """Raise InputError unless `box` is a list of four numbers in pixels. The sign of its extents is not checked.

    Args:
        where: the place of the box and its name, for messages.
        box: the value to check.
        order: meaning that the four numbers must have, `CORNERS` or `EXTENTS`.
    """
    if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
        raise InputError(f"{where} must be 4 numbers {order}, got {shown(box)}")
    if not all(abs(value) <= LARGEST for value in box):  # also false for NaN
        raise InputError(f"{where} must be in pixels, finite and at most {LARGEST}, got {box}")


def checked_corners(where: str, box: Any, order: str) -> list[float]:
    """Return x1, y1, x2, y2 of a box. Its arguments are those of `check_box`.

    Raises:
        ValueError: if the box is not four numbers in pixels, or has no width or no height.
    """
    check_box(where, box, order)
    x, y, right, bottom = box
    if order == EXTENTS:
        right, bottom = x + right, y + bottom
    if not (right > x and bottom > y):
        raise InputError(f"{where} {order} must have a width and a height above 0, got {box}")
    return [x, y, right, bottom]


def are_beyond(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return a mask of the boxes that reach more than one pixel beyond their images, bool `[T]`.

    Args:
        boxes: x1, y1, x2, y2, `[T, 4]`.
        sizes: width and height of each box's image in the same unit, `[T, 2]`.
    """
    outside = (boxes[:, :2] < -TOLERANCE) | (boxes[:, 2:] > sizes + TOLERANCE)
    return np.any(outside, axis=1)


def check_boxes(
    findings: Findings, names: Sequence[str], sizes: Sequence[tuple[int, int]], boxes: Sequence[np.ndarray], order: str
) -> None:
    """Record the boxes that reach beyond their images, and likely mistakes in their unit or order.

    Args:
        findings: the record.
        names, sizes: name of each image, and its width and height in pixels.
        boxes: boxes of each image as the file has them, float64 `[N, 4]`.
        order: meaning of the four numbers, `CORNERS` or `EXTENTS`.
    """
    owners = np.repeat(np.arange(len(boxes)), [len(of_image) for of_image in boxes])
    of_boxes = np.array(sizes, dtype=np.float64).reshape(-1, 2)[owners]
    numbers = np.concatenate([*boxes, np.zeros((0, 4))])
    ends = numbers[:, 2:] + (numbers[:, :2] if order == EXTENTS else 0)
    beyond = are_beyond(np.concatenate([numbers[:, :2], ends], axis=1), of_boxes)
    examples = [
        f"image {names[owners[row]]!r} of {of_boxes[row].tolist()} pixels: {order} {numbers[row].tolist()}"
        for row in np.flatnonzero(beyond)[:EXAMPLES]
    ]
    findings.add("found", "box beyond the image", examples, int(beyond.sum()))
    findings.causes += likely_causes(beyond, of_boxes, numbers, order)


def likely_causes(beyond: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, order: str) -> list[str]:
    """Return a sentence for each likely mistake in the unit or the order of boxes.

    Args:
        beyond: result of `are_beyond`, bool `[T]`.
        sizes: width and height of each box's image, in the unit that the numbers must have, `[T, 2]`.
        numbers: the four numbers of each box as the file has them, `[T, 4]`.
        order: meaning that the four numbers must have, such as "x, y, width, height".
    """
    if not len(beyond):
        return []
    causes = []
    if numbers.min() >= 0 and numbers.max() <= 1 and sizes.min() > 1:
        causes.append(f"all numbers of all boxes are between 0 and 1, but must be {order} in pixels")
    corners = (numbers[:, 2:] > numbers[:, :2]) & (numbers[:, 2:] <= sizes + TOLERANCE)
    if beyond.mean() > MANY and corners.all(1).mean() > NEARLY_ALL:
        causes.append(
            f"{beyond.sum():,} of {len(beyond):,} boxes reach beyond their images, but would fit if their numbers were "
            f"x1, y1, x2, y2. They must be {order}"
        )
    return causes


class PredictedBoxes:
    """A collector of the boxes that a system predicts, to find boxes in the wrong unit.

    Evaluators accept any boxes, and recall is 0 if they are in another unit than the annotations.
    """

    def __init__(self) -> None:
        self._boxes = self._beyond = 0
        self._largest = 0.0
        self._reach: list[float] = []  # of each image, the ratio of the farthest predicted and annotated coordinates

    def add(self, graph: SceneGraph, boxes: Tensor) -> None:
        """Add the boxes predicted for an image, float `[N, 4]`: x1, y1, x2, y2."""
        if not len(boxes) or not len(graph.boxes):
            return
        self._boxes += len(boxes)
        self._beyond += int(are_beyond(boxes.numpy(), np.array((graph.width, graph.height))).sum())
        farthest = boxes.amax().item()
        self._largest = max(self._largest, farthest)
        self._reach.append(farthest / max(graph.boxes.amax().item(), 1.0))

    def causes(self) -> list[str]:
        """Return a sentence for each likely mistake in the unit of the boxes."""
        if not self._boxes:
            return []
        must = "they must be in pixels of the original image"
        reach = statistics.median(self._reach)
        if self._largest <= 1:
            return [f"all coordinates of the {self._boxes:,} predicted boxes are at most 1, but {must}"]
        if self._beyond > MANY * self._boxes:
            return [f"{self._beyond:,} of {self._boxes:,} predicted boxes reach beyond their images, but {must}"]
        if reach < SHRUNK:
            return [f"predicted boxes reach only {reach:.2f} times as far as annotated ones (median), but {must}"]
        return []
