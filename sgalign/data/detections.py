"""Detected objects, read from a JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.data.scene_graph import check_objects
from sgalign.errors import InputError
from sgalign.files import read_json

_FIELDS = ("boxes_xyxy", "labels", "scores")


class Detections(NamedTuple):
    """The detected objects of one image."""

    boxes: Tensor  # float32 [N, 4], x1, y1, x2, y2 in pixels
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N], from 0 to 1


def read_detections(path: str | Path, num_objects: int) -> dict[str, Detections]:
    """Return the detections of each image from a JSON file.

    The file contains a JSON object that maps image names to three lists of equal length:

    - `boxes_xyxy`: x1, y1, x2, y2 in 0-based pixels.
    - `labels`: classes from 0, in the order of the data set's classes. The returned labels start at 1.
    - `scores`: confidence of the detector, from 0 to 1.

    Args:
        path: the file.
        num_objects: number of object classes without the background.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is malformed. The error names the file, the image and the field.
    """
    path = Path(path)
    images = read_json(path, "write the file as docs/data.md describes")
    if not isinstance(images, dict):
        raise InputError(f"{path}: must be a JSON object with image names as keys, got {type(images).__name__}")
    return {name: _parse(f"{path}, image {name!r}: ", image, num_objects) for name, image in images.items()}


def _parse(where: str, image: Any, num_objects: int) -> Detections:
    if not isinstance(image, dict) or not image.keys() >= set(_FIELDS):
        raise InputError(
            f"{where}must have {', '.join(_FIELDS)}, got {list(image) if isinstance(image, dict) else image!r}"
        )
    lists = [image[field] for field in _FIELDS]
    if not all(isinstance(values, list) for values in lists) or len({len(values) for values in lists}) != 1:
        raise InputError(f"{where}{', '.join(_FIELDS)} must be lists of equal length")
    boxes, labels, scores = lists
    for row, (box, label, score) in enumerate(zip(boxes, labels, scores)):
        if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
            raise InputError(f"{where}boxes_xyxy must have 4 numbers per box, got {box!r} in row {row}")
        if type(label) is not int or not 0 <= label < num_objects:
            raise InputError(f"{where}labels must be integers from 0 to {num_objects - 1}, got {label!r} in row {row}")
        if type(score) not in (int, float) or not 0 <= score <= 1:
            raise InputError(f"{where}scores must be from 0 to 1, got {score!r} in row {row}")
    try:
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    except OverflowError as error:
        raise InputError(f"{where}boxes_xyxy must be finite ({error})") from error
    found = Detections(corners, torch.tensor(labels, dtype=torch.int64) + 1, torch.tensor(scores, dtype=torch.float32))
    check_objects(where, found.boxes, found.labels, (torch.float32,))
    return found
