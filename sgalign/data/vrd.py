"""The Visual Relationship Detection data set (Lu, Krishna, Bernstein, Fei-Fei, ECCV 2016) in its official format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgalign.data.box_checks import LARGEST, are_beyond
from sgalign.data.class_names import Classes, read_classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.images import check_file_name, image_size, image_sizes, load_image, save_image
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.data.splits import SPLITS, Split, ValidationChoice, check_split, held_out
from sgalign.errors import InputError, shown
from sgalign.files import read_json, write_json

REMEDY = "download the annotations again from https://cs.stanford.edu/people/ranjaykrishna/vrd/"
IMAGE_FOLDERS = ("images", "sg_train_images", "sg_test_images")  # the last two are the folders of VRD's own archive
_KEYS = {"subject", "predicate", "object"}


class VRDDataset(SceneGraphDataset):
    """VRD's scene graphs with 100 object classes, 70 predicates, 4000 training and 1000 test photographs.

    Categories start at 0 in the files and at 1 here. The files' boxes are [ymin, ymax, xmin, xmax] in 0-based pixels.
    Objects of an image with the same box and class become one object. Nothing is filtered: images without relations,
    relations of an object with itself, repeated relations and several predicates per pair are all kept. The size of an
    image comes from its file. If there is no file, the size is the smallest one that contains the image's boxes.

    Args:
        root: folder with annotations_train.json, annotations_test.json, objects.json and predicates.json. Image files
            are optional, in images/, sg_train_images/ or sg_test_images/.
        split: "train", "validation" or "test". "validation" is held out from annotations_train.json, and "train" is
            the rest of that file.
        validation_images: number of images to hold out. If None, 600, but at most a fifth of the training images.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.

    Attributes:
        object_names: class names, `__background__` first.
        predicate_names: predicate names, `__background__` first.
        findings: the rows that were left out, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the image and the row.
    """

    annotation_files = ("annotations_*.json", "objects.json", "predicates.json")

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        validation_images: int | None = None,
        validation_choice: ValidationChoice = "hash",
        bad_rows: BadRows = "error",
    ) -> None:
        check_split(split)
        self.root = Path(root)
        self._objects, self._predicates = (self._read_names(name) for name in ("objects", "predicates"))
        self.object_names, self.predicate_names = self._objects.names, self._predicates.names
        self._files = ImageFiles([self.root / folder for folder in IMAGE_FOLDERS])
        path = self.root / _file(split)
        annotations = read_json(path, REMEDY)
        if not isinstance(annotations, dict):
            raise InputError(
                f"{path}: must be a JSON object with image names as keys, got {type(annotations).__name__}; {REMEDY}"
            )
        if split != "test":
            marks = held_out(list(annotations), validation_images, 600, validation_choice, path)
            wanted = [mark == (split == "validation") for mark in marks]
            annotations = dict(item for item, kept in zip(annotations.items(), wanted, strict=True) if kept)
        self.findings = Findings(f"{path}, {split}")
        self._images = [graph for name, rows in annotations.items() if (graph := self._read(path, name, rows))]
        without = [graph.image_id for graph in self._images if graph.image is None]
        self.findings.add("found", "image without a file, sized by its boxes", without, len(without))
        for graph in self._images:
            beyond = are_beyond(graph.boxes.numpy(), np.array((graph.width, graph.height)))
            self.findings.add("found", "box beyond the image", graph.image_id, int(beyond.sum()))
        self.findings.raise_or_log(bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        return [split for split in SPLITS if (root / _file(split)).exists()]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SceneGraph:
        return self._images[index]

    def _read(self, path: Path, name: str, rows: Any) -> SceneGraph | None:
        """Return the scene graph of one image, or None if it cannot be read."""
        if not isinstance(rows, list):
            got = f"must be a list of relations, got {type(rows).__name__}; {REMEDY}"
            self.findings.refuse("image without a list of relations", f"{path}, image {name!r}: {got}")
            return None
        try:
            check_file_name(f"{path}: the name of an image", name)
        except InputError as error:
            self.findings.refuse("image with a malformed name", str(error))
            return None
        boxes, labels, relations = self._parse(path, name, rows)
        # Coordinates are pixel indices from 0, so the smallest possible size is the largest index plus 1.
        width, height = (boxes[:, 2:].amax(0).int() + 1).clamp(min=1).tolist() if len(boxes) else (1, 1)
        file = self._files.find(name)
        if file is None:
            return SceneGraph(name, width, height, boxes, labels, relations)
        try:
            size = image_size(file)
            # Boxes that fit only after the rotation were drawn on the upright photograph.
            if not _contains(size, width, height) and _contains(turned := image_sizes(file)[1], width, height):
                size = turned
        except InputError as error:
            self.findings.refuse("image that cannot be read", str(error))
            return None
        width, height = size
        return SceneGraph(name, width, height, boxes, labels, relations, partial(load_image, file, size))

    def _parse(self, path: Path, name: str, rows: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, labels and relations of one image, with the objects in order of first mention."""
        objects: dict[tuple[int, ...], int] = {}
        relations = []
        for number, row in enumerate(rows):
            where = f"{path}, image {name!r}, row {number}"
            try:
                if not isinstance(row, dict) or not row.keys() >= _KEYS:
                    raise InputError(f"{where}: must have subject, predicate and object, got {shown(row)}; {REMEDY}")
                ends = [_parse_object(f"{where}, {role}", row[role], self._objects) for role in ("subject", "object")]
                predicate = self._predicates.number(f"{where}, predicate", row["predicate"])
            except InputError as error:
                self.findings.refuse("relation with a malformed row", str(error))
                continue
            subject, object_ = (objects.setdefault(end, len(objects)) for end in ends)
            relations.append((subject, object_, predicate))
        return (
            torch.tensor([key[1:] for key in objects], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([key[0] for key in objects], dtype=torch.int64),
            torch.tensor(relations, dtype=torch.int64).reshape(-1, 3),
        )

    def _read_names(self, name: str) -> Classes:
        path = self.root / f"{name}.json"
        names = read_json(path, REMEDY)
        if not isinstance(names, list):
            raise InputError(f"{path}: must be a list of names; {REMEDY}")
        return read_classes(str(path), enumerate(names))


def _file(split: Split) -> str:
    return f"annotations_{'test' if split == 'test' else 'train'}.json"


def _contains(size: tuple[int, int], width: int, height: int) -> bool:
    return size[0] >= width and size[1] >= height


def _parse_object(where: str, entry: Any, classes: Classes) -> tuple[int, ...]:
    """Return the object's class from 1, followed by x1, y1, x2, y2."""
    if not isinstance(entry, dict) or not entry.keys() >= {"category", "bbox"}:
        raise InputError(f"{where}: must have category and bbox, got {shown(entry)}; {REMEDY}")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or any(type(v) is not int or abs(v) >= LARGEST for v in box):
        raise InputError(
            f"{where}: bbox must be 4 integers [ymin, ymax, xmin, xmax] below {LARGEST}, got {shown(box)}; {REMEDY}"
        )
    top, bottom, left, right = box
    if top >= bottom or left >= right:
        raise InputError(
            f"{where}: bbox [ymin, ymax, xmin, xmax] must have a width and a height above 0, got {box}; "
            "correct or remove it"
        )
    return classes.number(f"{where}, category", entry["category"]), left, top, right, bottom


def write_vrd(
    parts: Mapping[str, Sequence[SceneGraph]],
    object_names: list[str],
    predicate_names: list[str],
    root: Path,
    *,
    images: bool = False,
) -> None:
    """Write scene graphs in VRD's layout.

    Objects without relations are lost, because the layout cannot represent them. Validation images are written with the
    training images.

    Raises:
        ValueError: if two images of a file would have the same name.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "objects.json", object_names[1:])
    write_json(root / "predicates.json", predicate_names[1:])
    for name, splits in (("train", ("train", "validation")), ("test", ("test",))):
        content = {}
        for graph in (graph for split in splits for graph in parts.get(split, [])):
            file_name = graph.image_id.replace("/", "_") + ".jpg"
            if file_name in content:
                raise InputError(f"image ids must give different file names, but {file_name!r} occurs twice")
            if images:
                save_image(graph, root / "images" / file_name)
            ends = [
                {"category": label - 1, "bbox": [round(y1), round(y2), round(x1), round(x2)]}
                for (x1, y1, x2, y2), label in zip(graph.boxes.tolist(), graph.labels.tolist(), strict=True)
            ]
            content[file_name] = [
                {"subject": ends[s], "predicate": p - 1, "object": ends[o]} for s, o, p in graph.relations.tolist()
            ]
        write_json(root / f"annotations_{name}.json", content)
