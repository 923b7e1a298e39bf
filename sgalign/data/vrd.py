"""The Visual Relationship Detection data set (Lu, Krishna, Bernstein, Fei-Fei, ECCV 2016) in its official format."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgalign.data.images import image_size, load_image, save_image
from sgalign.data.scene_graph import BACKGROUND, SceneGraph, check_split, count_validation_images
from sgalign.errors import InputError
from sgalign.files import read_json, write_json

LARGEST = 1 << 24  # largest coordinate, up to which float32 represents every integer
REMEDY = "download the annotations again from https://cs.stanford.edu/people/ranjaykrishna/vrd/"
_KEYS = {"subject", "predicate", "object"}


class VRDDataset(Dataset[SceneGraph]):
    """VRD's scene graphs with 100 object classes, 70 predicates, 4000 training and 1000 test photographs.

    Categories start at 0 in the files and at 1 here. The files' boxes are [ymin, ymax, xmin, xmax] in 0-based pixels.
    Objects of an image with the same box and class become one object. Nothing is filtered: images without relations,
    relations of an object with itself, repeated relations and several predicates per pair are all kept. The size of an
    image comes from the file `images/NAME`. If that file is missing, the size is the smallest one that contains the
    image's boxes.

    Args:
        root: folder with annotations_train.json, annotations_test.json, objects.json and predicates.json. The folder
            images/ is optional.
        split: "train", "validation" or "test". "validation" is held out from annotations_train.json, and "train" is
            the rest of that file.
        validation_images: number of images to hold out. If None, 600, but at most a fifth of the training images. The
            images with the lowest hashes of their names are held out. The choice therefore does not depend on file
            order or a random generator, and a larger validation split contains every smaller one.

    Attributes:
        object_names: class names, `__background__` first.
        predicate_names: predicate names, `__background__` first.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the image and the row.
    """

    def __init__(
        self, root: str | Path, split: Literal["train", "validation", "test"], *, validation_images: int | None = None
    ) -> None:
        check_split(split)
        self.root = Path(root)
        self.object_names = _read_names(self.root / "objects.json")
        self.predicate_names = _read_names(self.root / "predicates.json")
        path = self.root / f"annotations_{'test' if split == 'test' else 'train'}.json"
        annotations = read_json(path, REMEDY)
        if not isinstance(annotations, dict):
            raise InputError(
                f"{path}: must be a JSON object with image names as keys, got {type(annotations).__name__}; {REMEDY}"
            )
        if split != "test":
            count = count_validation_images(validation_images, len(annotations), 600, path)
            held_out = set(sorted(annotations, key=_stable_hash)[:count])
            annotations = {n: rows for n, rows in annotations.items() if (n in held_out) == (split == "validation")}
        self._images = [(name, *self._parse(path, name, rows)) for name, rows in annotations.items()]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SceneGraph:
        name, boxes, labels, relations = self._images[index]
        path = self.root / "images" / name
        if path.is_file():
            width, height = image_size(path)
            return SceneGraph(name, width, height, boxes, labels, relations, partial(load_image, path))
        # Coordinates are pixel indices from 0, so the size is the largest index plus 1.
        width, height = (boxes[:, 2:].amax(0).int() + 1).tolist() if len(boxes) else (1, 1)
        return SceneGraph(name, width, height, boxes, labels, relations)

    def _parse(self, path: Path, name: str, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, labels and relations of one image, with the objects in order of first mention."""
        if not isinstance(rows, list):
            raise InputError(
                f"{path}, image {name!r}: must be a list of relations, got {type(rows).__name__}; {REMEDY}"
            )
        objects: dict[tuple[int, ...], int] = {}
        relations = []
        for number, row in enumerate(rows):
            where = f"{path}, image {name!r}, row {number}"
            if not isinstance(row, dict) or not row.keys() >= _KEYS:
                raise InputError(f"{where}: must have subject, predicate and object, got {row!r}; {REMEDY}")
            subject, object_ = (
                objects.setdefault(_parse_object(f"{where}, {role}", row[role], self.object_names), len(objects))
                for role in ("subject", "object")
            )
            predicate = _category(f"{where}, predicate", row["predicate"], self.predicate_names)
            relations.append((subject, object_, predicate))
        return (
            torch.tensor([key[1:] for key in objects], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([key[0] for key in objects], dtype=torch.int64),
            torch.tensor(relations, dtype=torch.int64).reshape(-1, 3),
        )


def _parse_object(where: str, entry: Any, names: list[str]) -> tuple[int, ...]:
    """Return the object's class from 1, followed by x1, y1, x2, y2."""
    if not isinstance(entry, dict) or not entry.keys() >= {"category", "bbox"}:
        raise InputError(f"{where}: must have category and bbox, got {entry!r}; {REMEDY}")
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or any(type(v) is not int or abs(v) > LARGEST for v in box):
        raise InputError(
            f"{where}: bbox must be 4 integers [ymin, ymax, xmin, xmax] of at most {LARGEST}, got {box!r}; {REMEDY}"
        )
    top, bottom, left, right = box
    if top >= bottom or left >= right:
        raise InputError(
            f"{where}: bbox [ymin, ymax, xmin, xmax] must have a width and a height above 0, got {box}; "
            "correct or remove it"
        )
    return _category(f"{where}, category", entry["category"], names), left, top, right, bottom


def _category(where: str, value: Any, names: list[str]) -> int:
    """Convert a class that counts from 0 to a class that counts from 1. `names` includes the background."""
    if type(value) is not int or not 0 <= value < len(names) - 1:
        raise InputError(f"{where}: must be an integer from 0 to {len(names) - 2}, got {value!r}; {REMEDY}")
    return value + 1


def _read_names(path: Path) -> list[str]:
    names = read_json(path, REMEDY)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: must be a list of names; {REMEDY}")
    return [BACKGROUND, *names]


def _stable_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


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
    """
    root.mkdir(parents=True)
    write_json(root / "objects.json", object_names[1:])
    write_json(root / "predicates.json", predicate_names[1:])
    for name, splits in (("train", ("train", "validation")), ("test", ("test",))):
        content = {}
        for graph in (graph for split in splits for graph in parts.get(split, [])):
            file_name = graph.image_id.replace("/", "_") + ".jpg"
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
