"""Data sets with boxes in COCO's format and relations in `rel.json`. Use this layout for your own data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from sgalign.data.images import load_image, save_image
from sgalign.data.scene_graph import BACKGROUND, SceneGraph, check_split
from sgalign.errors import InputError
from sgalign.files import read_json, write_json

FILES = {"train": "train", "validation": "val", "test": "test"}


class CocoDataset(Dataset[SceneGraph]):
    """Scene graphs of a folder with COCO files and `rel.json`, which is the layout that RelTR and EGTR read.

    `train.json`, `val.json` and `test.json` are in COCO's format. Each has `images` (`id`, `file_name`, `width`,
    `height`), `annotations` (`image_id`, `category_id`, `bbox` as x, y, width, height) and `categories` (`id`, `name`).
    The ids may be any integers.

    `rel.json` has `rel_categories`, the list of predicate names. The list may start with `__background__`. For each of
    "train", "val" and "test", `rel.json` maps each image id to a list of relations `[subject, object, predicate]`.
    Subject and object are indices of the image's annotations, from 0 in file order. The predicate is an index into
    `rel_categories`, from 0.

    Args:
        root: folder of these files. Image files are optional. They are in this folder or in its subfolder `images/`.
        split: "train", "validation" (`val.json`) or "test".

    Attributes:
        object_names, predicate_names: class names, `__background__` first. Names must not be empty and may have any
            characters.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the image and the row.
    """

    def __init__(self, root: str | Path, split: Literal["train", "validation", "test"]) -> None:
        check_split(split)
        self.root = Path(root)
        path, rel = self.root / f"{FILES[split]}.json", self.root / "rel.json"
        content, relations = read_json(path), read_json(rel)
        for where, value, fields in (
            (path, content, ("images", "annotations", "categories")),
            (rel, relations, ("rel_categories", FILES[split])),
        ):
            if missing := [field for field in fields if not isinstance(value, dict) or field not in value]:
                raise InputError(f"{where}: must have {', '.join(fields)}, but lacks {', '.join(missing)}")
        try:
            self._read(path, content, rel, relations, FILES[split])
        except (AttributeError, OverflowError, TypeError) as error:
            raise InputError(f"{path}, {rel}: must be in COCO's format with relations ({error})") from error

    def _read(self, path: Path, content: dict[str, Any], rel: Path, relations: dict[str, Any], part: str) -> None:
        try:
            categories = sorted(content["categories"], key=lambda category: category["id"])
            label_of = {category["id"]: index + 1 for index, category in enumerate(categories)}
            self.object_names = [BACKGROUND, *(str(category["name"]) for category in categories)]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: every category must have id and name ({error})") from error
        if not isinstance(relations["rel_categories"], list) or not isinstance(relations[part], dict):
            raise InputError(
                f"{rel}: rel_categories must be a list of names, and {part} a JSON object with image ids as keys"
            )
        predicates = [str(name) for name in relations["rel_categories"]]
        self._first = 0 if predicates[:1] == [BACKGROUND] else 1
        self.predicate_names = [BACKGROUND, *predicates[1 - self._first :]]
        if "" in (*self.object_names, *self.predicate_names):
            raise InputError(f"{path}, {rel}: category names must not be empty, got an empty name")
        self._images = _parse(path, content, label_of)
        by_id = relations[part]
        if unknown := by_id.keys() - {str(image["id"]) for image in self._images.values()}:
            raise InputError(f"{rel}, {part}: image ids must occur in {path.name}, got {min(unknown)!r}")
        for image in self._images.values():
            triplets = by_id.get(str(image["id"]), [])
            image["relations"] = self._relations(f"{rel}, {part}, image {image['id']}", triplets, image)
        self._order = list(self._images)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> SceneGraph:
        image = self._images[self._order[index]]
        boxes = torch.tensor(image["boxes"], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        name = image["file_name"]
        path = next((p for p in (self.root / name, self.root / "images" / name) if p.is_file()), None)
        return SceneGraph(
            name,
            image["width"],
            image["height"],
            boxes,
            torch.tensor(image["labels"], dtype=torch.int64),
            torch.tensor(image["relations"], dtype=torch.int64).reshape(-1, 3),
            None if path is None else partial(load_image, path),
        )

    def _relations(self, where: str, triplets: Any, image: dict[str, Any]) -> list[list[int]]:
        objects, lowest = len(image["labels"]), 1 - self._first
        highest = len(self.predicate_names) - 1 - self._first
        for row, triplet in enumerate(triplets):
            if not isinstance(triplet, list) or len(triplet) != 3 or any(type(v) is not int for v in triplet):
                raise InputError(f"{where}: must be [subject, object, predicate], got {triplet!r} in row {row}")
            if not 0 <= min(triplet[:2]) <= max(triplet[:2]) < objects:
                raise InputError(f"{where}: objects must be from 0 to {objects - 1}, got {triplet[:2]} in row {row}")
            if not lowest <= triplet[2] <= highest:
                raise InputError(
                    f"{where}: predicate must be from {lowest} to {highest}, got {triplet[2]} in row {row}"
                )
        return [[s, o, p + self._first] for s, o, p in triplets]


def _parse(path: Path, content: dict[str, Any], label_of: Mapping[Any, int]) -> dict[Any, dict[str, Any]]:
    """Return the images of a COCO file by id, each with its `boxes` (x, y, width, height) and `labels`."""
    images: dict[Any, dict[str, Any]] = {}
    names: set[str] = set()
    for number, image in enumerate(content["images"]):
        fields = ("id", "file_name", "width", "height")
        if not isinstance(image, dict) or not image.keys() >= set(fields):
            raise InputError(f"{path}, images, row {number}: must have {', '.join(fields)}, got {image!r}")
        name = Path(image["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(
                f"{path}, images, row {number}: file_name must lie in the data set's folder, got {str(name)!r}"
            )
        if image["id"] in images:
            raise InputError(f"{path}, images, row {number}: id must be unique, but {image['id']!r} occurs twice")
        if image["file_name"] in names:
            raise InputError(
                f"{path}, images, row {number}: file_name must be unique, but {image['file_name']!r} occurs twice"
            )
        names.add(image["file_name"])
        images[image["id"]] = {field: image[field] for field in fields} | {"boxes": [], "labels": []}
    for number, annotation in enumerate(content["annotations"]):
        where = f"{path}, annotations, row {number}"
        if not isinstance(annotation, dict) or not annotation.keys() >= {"image_id", "category_id", "bbox"}:
            raise InputError(f"{where}: must have image_id, category_id and bbox, got {annotation!r}")
        box = annotation["bbox"]
        if annotation["image_id"] not in images:
            raise InputError(f"{where}: image_id must be the id of an image, got {annotation['image_id']!r}")
        if annotation["category_id"] not in label_of:
            raise InputError(f"{where}: category_id must be the id of a category, got {annotation['category_id']!r}")
        if not isinstance(box, list) or len(box) != 4 or any(type(v) not in (int, float) for v in box):
            raise InputError(f"{where}: bbox must be 4 numbers x, y, width, height, got {box!r}")
        if max(map(abs, box)) > 1e9:
            raise InputError(f"{where}: bbox must be in pixels and at most 1e9, got {box}")
        if not (box[2] > 0 and box[3] > 0):
            raise InputError(f"{where}: bbox must have a width and a height above 0, got {box}")
        images[annotation["image_id"]]["boxes"].append(box)
        images[annotation["image_id"]]["labels"].append(label_of[annotation["category_id"]])
    return images


def write_coco(
    parts: Mapping[str, Iterable[SceneGraph]],
    object_names: list[str],
    predicate_names: list[str],
    root: str | Path,
    *,
    images: bool = False,
) -> None:
    """Write scene graphs of any data set in the layout that `CocoDataset` reads.

    Args:
        parts: scene graphs by split: "train", "validation" and "test".
        object_names, predicate_names: class names of the data set, background first.
        root: output folder, created if it does not exist.
        images: if True, also write the images into `images/`. An image id with a dot is the file name, and its suffix
            determines the format. Other images are JPEG files.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    categories = [{"id": index, "name": name} for index, name in enumerate(object_names)][1:]
    relations: dict[str, Any] = {"rel_categories": predicate_names}
    for part, graphs in parts.items():
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        of_part = relations[FILES[part]] = {}
        for number, graph in enumerate(graphs):
            name = graph.image_id if "." in graph.image_id else f"{graph.image_id.replace('/', '_')}.jpg"
            if images:
                save_image(graph, root / "images" / name)
            size = {"width": graph.width, "height": graph.height}
            content["images"].append({"id": number, "file_name": name} | size)
            for (x1, y1, x2, y2), label in zip(graph.boxes.tolist(), graph.labels.tolist(), strict=True):
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]),
                        "image_id": number,
                        "category_id": label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
            of_part[str(number)] = graph.relations.tolist()
        write_json(root / f"{FILES[part]}.json", content)
    write_json(root / "rel.json", relations)
