"""Detected objects, read from a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgalign.data.box_checks import EXTENTS, PredictedBoxes, check_box
from sgalign.data.class_names import Classes, id_text
from sgalign.data.findings import Findings, counted, warn
from sgalign.data.image_ids import ImageIds
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset, check_objects
from sgalign.errors import InputError, shown
from sgalign.files import read_json

_FIELDS = ("boxes_xyxy", "labels", "scores")
_ROW_FIELDS = ("image_id", "bbox", "score")
_CLASS_FIELDS = ("category_id", "category_name", "category")


class Detections(NamedTuple):
    """The detected objects of one image."""

    boxes: Tensor  # float32 [N, 4], x1, y1, x2, y2 in pixels
    labels: Tensor  # int64 [N], from 1
    scores: Tensor  # float32 [N], from 0 to 1


NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


class CocoIds(NamedTuple):
    """The images and classes that the ids in COCO results stand for.

    Attributes:
        images: the images.
        classes: the object classes.
    """

    images: ImageIds
    classes: Classes


def coco_ids(dataset: SceneGraphDataset) -> CocoIds:
    """Return what the ids in COCO results mean for a data set."""
    names = [graph.image_id for graph in dataset]
    if dataset.object_classes is None:
        return ids_of_names(names, dataset.object_names)
    return CocoIds(ImageIds(names, dataset.image_names), dataset.object_classes)


def ids_of_names(names: Sequence[str], object_names: Sequence[str]) -> CocoIds:
    """Return ids for images whose files give no ids. The id of a class is then its number, from 1.

    Args:
        names: names of the images.
        object_names: class names, background first.
    """
    classes = Classes(list(object_names), {str(number): number for number in range(len(object_names))})
    return CocoIds(ImageIds(names, {}), classes)


def read_detections(
    path: str | Path, object_names: Sequence[str], ids: Callable[[], CocoIds] | None = None
) -> dict[str, Detections]:
    """Return the detections of each image from a JSON file.

    The file has one of two forms. The first is a JSON object that maps image names to three lists of equal length:

    - `boxes_xyxy`: x1, y1, x2, y2 in 0-based pixels.
    - `labels`: classes from 0, in the order of the data set's classes, or class names. The returned labels start at 1.
    - `scores`: confidence of the detector, from 0 to 1.

    The second is COCO's format of results, a list with one JSON object per detection:

    - `image_id`: the id of the image, an integer or text.
    - `category_id`: the id of the class, or its name. `category_name` or `category` may replace it.
    - `bbox`: x, y, width, height in 0-based pixels.
    - `score`: as above.

    COCO results may contain images that the data do not have. They are left out, and their number is logged.

    Args:
        path: the file.
        object_names: class names, background first.
        ids: function that returns the meaning of the ids in COCO results, such as `coco_ids` of a data set. It is
            called only for such a file. If None, `image_id` is the name of the image and `category_id` is the number of
            the class, from 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is malformed, or if it has COCO results but none of a known image. The error names the
            file, the image or row, and the field.
    """
    path = Path(path)
    content = read_json(path, "write the file as docs/data.md describes")
    numbers = {name: number for number, name in enumerate(object_names) if number}
    if isinstance(content, list):
        return _read_results(path, content, ids() if ids is not None else None, numbers)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: must be a JSON object with image names as keys, or a list of COCO results, got "
            f"{type(content).__name__}"
        )
    return {name: _parse(f"{path}, image {name!r}: ", image, numbers) for name, image in content.items()}


def check_detections(detections: Mapping[str, Detections], graphs: Sequence[SceneGraph], split: str) -> None:
    """Log the number of images that only the split or only the detections have, and wrong units of boxes.

    Args:
        detections: the result of `read_detections`.
        graphs: the scene graphs of the split.
        split: name of the split.

    Raises:
        ValueError: if the detections contain no image of the split.
    """
    findings, boxes = Findings("detections"), PredictedBoxes()
    known = {graph.image_id: graph for graph in graphs}
    if known and known.keys().isdisjoint(detections):
        example = next(iter(known))
        raise InputError(f"detections must contain images of the {split} split, such as {example!r}, but contain none")
    missing, unknown = sorted(known.keys() - detections.keys()), sorted(detections.keys() - known.keys())
    findings.add("found", f"image of the {split} split without detections", missing, len(missing))
    findings.add("left out", f"image outside the {split} split", unknown, len(unknown))
    for name in known.keys() & detections.keys():
        boxes.add(known[name], detections[name].boxes)
    findings.causes = boxes.causes()
    findings.log()


def _parse(where: str, image: Any, numbers: Mapping[str, int]) -> Detections:
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
        if not (label in numbers if isinstance(label, str) else type(label) is int and 0 <= label < len(numbers)):
            raise InputError(
                f"{where}labels must be integers from 0 to {len(numbers) - 1} or names of classes, got {label!r} in "
                f"row {row}"
            )
        if not _is_score(score):
            raise InputError(f"{where}scores must be from 0 to 1, got {score!r} in row {row}")
    classes = [numbers[label] if isinstance(label, str) else label + 1 for label in labels]
    try:
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    except OverflowError as error:
        raise InputError(f"{where}boxes_xyxy must be finite ({error})") from error
    found = Detections(corners, torch.tensor(classes, dtype=torch.int64), torch.tensor(scores, dtype=torch.float32))
    check_objects(where, found.boxes, found.labels, (torch.float32,))
    return found


def _is_score(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _read_results(
    path: Path, rows: list[Any], ids: CocoIds | None, numbers: Mapping[str, int]
) -> dict[str, Detections]:
    """Return the detections of COCO results. `numbers` has the number of each class by its name."""
    classes = ids_of_names((), ["", *numbers]).classes if ids is None else ids.classes
    found: dict[str, list[tuple[list[float], int, float]]] = {}
    unknown: Counter[str] = Counter()
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        image_id, label = _parse_row(where, row, classes, numbers)
        name = image_id if ids is None else ids.images.find(f"{where}: image_id", image_id)
        if name is not None:
            found.setdefault(name, []).append((row["bbox"], label, row["score"]))
        else:
            unknown[image_id] += 1
    if unknown and ids is not None:
        others = f"{counted(len(unknown), 'image')} that the data do not have, such as {next(iter(unknown))!r}"
        if not found:
            raise InputError(
                f"{path}: image_id must be the id of an image, such as {ids.images.example!r}, got {others}"
            )
        warn(f"{path}: left out {counted(unknown.total(), 'detection')} of {others}")
    return {name: _detections(rows) for name, rows in found.items()}


def _parse_row(where: str, row: Any, classes: Classes, numbers: Mapping[str, int]) -> tuple[str, int]:
    """Check a row of COCO results. Return its image id as text, and the number of its class."""
    given = [field for field in _CLASS_FIELDS if isinstance(row, dict) and field in row]
    if not given or not row.keys() >= set(_ROW_FIELDS):
        raise InputError(f"{where}: must have {', '.join(_ROW_FIELDS)} and category_id, got {shown(row)}")
    image_id = id_text(row["image_id"])
    if not image_id:
        raise InputError(f"{where}: image_id must be an integer or text, got {row['image_id']!r}")
    check_box(f"{where}: bbox", row["bbox"], EXTENTS)
    if min(row["bbox"][2:]) < 0:
        raise InputError(f"{where}: bbox must have a width and a height of at least 0, got {row['bbox']}")
    if not _is_score(row["score"]):
        raise InputError(f"{where}: score must be from 0 to 1, got {row['score']!r}")
    labels = [_class(where, field, row[field], classes, numbers) for field in given]
    if len(set(labels)) > 1:
        raise InputError(f"{where}: {' and '.join(given)} must be the same class, got {shown(row)}")
    return image_id, labels[0]


def _class(where: str, field: str, value: Any, classes: Classes, numbers: Mapping[str, int]) -> int:
    """Return the number of a class. `category_id` may be its id or its name, and other fields are its name."""
    if isinstance(value, str) and value in numbers and (field != "category_id" or value not in classes.numbers):
        return numbers[value]
    if field != "category_id" or isinstance(value, str) and value not in classes.numbers:
        raise InputError(f"{where}: {field} must be the name of a class, such as {min(numbers)!r}, got {shown(value)}")
    return classes.number(f"{where}: {field}", value)


def _detections(rows: list[tuple[list[float], int, float]]) -> Detections:
    """Return one image's detections from boxes, classes and scores. Corners are computed as `CocoDataset` does."""
    boxes, labels, scores = zip(*rows)
    corners = torch.tensor(boxes, dtype=torch.float32)
    corners[:, 2:] += corners[:, :2]
    return Detections(corners, torch.tensor(labels, dtype=torch.int64), torch.tensor(scores, dtype=torch.float32))
