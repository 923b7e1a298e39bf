"""Data sets with boxes in COCO's format and relations beside or inside. Use this layout for your own data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgalign.data.box_checks import EXTENTS, check_boxes, checked_corners
from sgalign.data.class_names import Classes, id_text, read_classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import is_file
from sgalign.data.images import Size, check_file_name, load_image, parse_size
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.data.splits import SPLITS, Split, ValidationChoice, check_has_no_validation, check_split, held_out
from sgalign.errors import InputError, shown
from sgalign.files import read_json

FILES: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
# Names of the folders of splits in the layout of annotation tools, in which each split is a folder.
FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train",), "validation": ("val", "valid"), "test": ("test",)}
_IMAGE_FIELDS = ("id", "file_name", "width", "height")
_ANNOTATION_FIELDS = ("image_id", "category_id", "bbox")
_RELATION_FIELDS = ("subject_id", "predicate_id", "object_id")


@dataclass
class _Image:
    """An image of a COCO file."""

    name: str
    size: Size
    boxes: list[list[float]] = field(default_factory=list)  # x, y, width, height
    labels: list[int] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)  # object index of each annotation, None if it is left out
    relations: list[tuple[int, int, int]] = field(default_factory=list)
    path: Path | None = None  # None if there is no file
    is_read: bool = True  # False for an image of the other split of train.json


class CocoDataset(SceneGraphDataset):
    """Scene graphs of a folder with COCO files and relations, as RelTR, EGTR and SGG-Benchmark read them.

    `train.json`, `val.json` and `test.json` are in COCO's format. Each has `images` (`id`, `file_name`, `width`,
    `height`), `annotations` (`image_id`, `category_id`, `bbox` as x, y, width, height) and `categories` (`id`, `name`).
    The ids may be integers or text. An annotation with `iscrowd` 1 is one object, because relations count the
    annotations of an image. The files may also be called `train/_annotations.coco.json`, and so on.

    Relations are in `rel.json`, as RelTR and EGTR read them, or inside of each file, as SGG-Benchmark reads them.

    `rel.json` has `rel_categories`, the list of predicate names. For each of "train", "val" and "test", `rel.json` maps
    each image id to a list of relations `[subject, object, predicate]`. Subject and object are indices of the image's
    annotations, from 0 in file order. The predicate is an index into `rel_categories`, from 0. If `rel_categories` is a
    list of objects with `id` and `name`, the predicate is such an id.

    Without `rel.json`, each file has `rel_categories` (`id`, `name`) and `rel_annotations` (`subject_id`,
    `predicate_id`, `object_id`). Subject and object are ids of annotations. If a relation has an `image_id`, it must be
    that of its objects.

    The first category and the first predicate may be the background, under any of its usual names.

    Args:
        root: folder of these files. Image files are optional. They are in this folder, in its subfolder `images/`, or
            beside the file of their split.
        split: "train", "validation" or "test". If there is no `val.json`, the validation split is held out from
            `train.json`.
        validation_images: number of images to hold out. If None, 5000, but at most a fifth of the training images. It
            must be None if there is a `val.json`.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.

    Attributes:
        object_names, predicate_names: class names, `__background__` first. They may have any characters.
        object_classes: the object classes, with their ids in the file.
        image_names: name of each image of the file by its id, as `id_text` writes the id. It includes images that are
            in the other split of `train.json`.
        findings: the rows that were left out, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the image and the row.
    """

    object_classes: Classes

    annotation_files = ("train.json", "val.json", "test.json", "rel.json", "*/_annotations.coco.json")

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
        self.root, self._rel = Path(root), Path(root, "rel.json")
        has_validation = _file(self.root, "validation") is not None
        if has_validation:
            check_has_no_validation(self.root, validation_images, validation_choice)
        holds_out = split != "test" and not has_validation
        read: Split = "train" if holds_out else split
        self._part = FILES[read]
        self._path = _file(self.root, read) or self.root / f"{self._part}.json"
        kinds: dict[str, type] = {"images": list, "annotations": list, "categories": list}
        content = _check_object(self._path, read_json(self._path), kinds)
        # Relations inside of the file refer to the ids of annotations. Those in rel.json count annotations.
        self._by_id = not self._rel.exists()
        source = self._path if self._by_id else self._rel
        relations = self._with_relations(content)
        self.object_classes = read_classes(
            f"{self._path}, categories", ((None, entry) for entry in content["categories"])
        )
        self._predicates = read_classes(f"{source}, rel_categories", enumerate(relations["rel_categories"]))
        self.object_names, self.predicate_names = self.object_classes.names, self._predicates.names

        self.findings = Findings(f"{self._path}, {split}")
        self._names: set[str] = set()
        # The lowest object index of all relations, and the largest distance of an index from the last valid one.
        self._lowest, self._excess = 1, 0
        images = self._read_images(content["images"])
        self._images = [image for image in images.values() if image is not None]
        if holds_out:
            names = [image.name for image in self._images]
            marks = held_out(names, validation_images, 5000, validation_choice, self._path)
            for image, mark in zip(self._images, marks, strict=True):
                image.is_read = mark == (split == "validation")
            self._images = [image for image in self._images if image.is_read]
            if split == "validation":
                self.findings.add(
                    "found", f"image held out from {self._path.relative_to(self.root)}", count=len(self._images)
                )
        self.image_names = {key: image.name for key, image in images.items() if image is not None}
        self._read_annotations(content["annotations"], images)
        if self._by_id:
            self._read_rel_annotations(relations["rel_annotations"], images)
        else:
            self._read_relations(relations[self._part], images)
        self._find_files()
        boxes = [np.array(image.boxes, dtype=np.float64).reshape(-1, 4) for image in self._images]
        names, sizes = [image.name for image in self._images], [image.size for image in self._images]
        check_boxes(self.findings, names, sizes, boxes, EXTENTS)
        self.findings.raise_or_log(bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        files = {split: _file(root, split) for split in SPLITS}
        files["validation"] = files["validation"] or files["train"]
        return [split for split, file in files.items() if file is not None]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SceneGraph:
        image = self._images[index]
        boxes = torch.tensor(image.boxes, dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # in float64, so a written box is read back exactly
        return SceneGraph(
            image.name,
            *image.size,
            boxes.float(),
            torch.tensor(image.labels, dtype=torch.int64),
            torch.tensor(image.relations, dtype=torch.int64).reshape(-1, 3),
            None if image.path is None else partial(load_image, image.path, image.size),
        )

    def _with_relations(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the file that has the relations, which may be this split's file itself."""
        if self._by_id and "rel_annotations" not in content:
            raise InputError(f"{self._path}: must have rel_annotations, or a file rel.json in {self.root}")
        if self._by_id:
            return _check_object(self._path, content, {"rel_categories": list, "rel_annotations": list})
        if content.get("rel_annotations"):
            raise InputError(f"{self._path}: must have no rel_annotations, because {self._rel} has the relations, too")
        return _check_object(self._rel, read_json(self._rel), {"rel_categories": list, self._part: dict})

    def _find_files(self) -> None:
        """Set the path of each image. Record the images without a file, if there are image files at all."""
        for image in self._images:
            folders = self.root, self.root / "images", self._path.parent
            paths = (folder / image.name for folder in folders)  # the name may contain folders
            image.path = next((path for path in paths if is_file(path)), None)
        missing = [image.name for image in self._images if image.path is None]
        if len(missing) < len(self._images) or (self.root / "images").is_dir():
            self.findings.add("found", "image without a file", missing, len(missing))

    def _read_images(self, rows: list[Any]) -> dict[str, _Image | None]:
        """Return the images by id. An image that is refused is None.

        If several images have the same id, all of them are refused, because their annotations cannot be told apart.
        """
        images: dict[str, _Image | None] = {}
        for number, row in enumerate(rows):
            where = f"{self._path}, images, row {number}"
            image_id = id_text(row.get("id")) if isinstance(row, dict) else None
            try:
                image = self._parse_image(where, row, images)
            except InputError as error:
                self.findings.refuse("image with a malformed entry", str(error))
                if image_id is not None:
                    if images.get(image_id) is not None:
                        self.findings.add("left out", "image whose id another image has", f"{where}: {image_id!r}")
                    images[image_id] = None
            else:
                images[str(image_id)] = image
        return images

    def _parse_image(self, where: str, row: Any, images: Mapping[str, Any]) -> _Image:
        if not isinstance(row, dict) or not row.keys() >= set(_IMAGE_FIELDS):
            lacks = [name for name in _IMAGE_FIELDS if not isinstance(row, dict) or name not in row]
            raise InputError(
                f"{where}: must have {', '.join(_IMAGE_FIELDS)}, but lacks {', '.join(lacks)}: {shown(row)}"
            )
        name, size = row["file_name"], parse_size(where, row)
        check_file_name(f"{where}: file_name", name)
        if id_text(row["id"]) is None:
            raise InputError(f"{where}: id must be an integer or text, got {row['id']!r}")
        if id_text(row["id"]) in images:
            raise InputError(f"{where}: id must be unique, but {row['id']!r} occurs twice")
        if name in self._names:
            raise InputError(f"{where}: file_name must be unique, but {name!r} occurs twice")
        self._names.add(name)
        return _Image(name, size)

    def _read_annotations(self, rows: list[Any], images: Mapping[str, _Image | None]) -> None:
        # Image of each annotation by its id, and the annotation's place in the image. None for a refused image.
        self._owners: dict[str, tuple[_Image | None, int]] = {}
        self._repeated: set[str] = set()  # ids of several annotations
        for number, row in enumerate(rows):
            where = f"{self._path}, annotations, row {number}"
            image_id = id_text(row.get("image_id")) if isinstance(row, dict) else None
            if image_id is None and self._by_id:
                self._note_id(row.get("id") if isinstance(row, dict) else None, None)
                got = f"must have an image_id, an integer or text, got {shown(row)}"
                self.findings.refuse("annotation without an image", f"{where}: {got}")
                continue
            if image_id is None:
                # Relations count the annotations of an image. Without this one, they would point to other objects.
                raise InputError(f"{where}: must have an image_id, an integer or text, got {shown(row)}")
            image = images.get(image_id)
            repeats = self._note_id(row.get("id"), image)
            if image_id in images and image is None:
                self.findings.add("left out", "object of a refused image", where)
            if (image is None and image_id in images) or (image is not None and not image.is_read):
                continue
            place = None
            if image is None:
                got = f"image_id must be the id of an image, got {shown(row['image_id'])}"
                self.findings.refuse("annotation of an unknown image", f"{where}: {got}")
                continue
            try:
                if repeats:
                    raise InputError(f"{where}: id must be unique, but {row['id']!r} occurs twice")
                box, label = self._parse_annotation(where, row)
            except InputError as error:
                self.findings.refuse("object with a malformed annotation", str(error))
            else:
                place = len(image.labels)
                image.boxes.append(box)
                image.labels.append(label)
                if row.get("iscrowd"):
                    self.findings.add("found", "annotation of a crowd, read as one object", where)
            image.places.append(place)
        unknown = [f for f in self.findings.with_outcome("refused") if f.kind == "annotation of an unknown image"]
        if unknown and not self._by_id:
            self.findings.causes.append(
                f"{unknown[0]} may belong to a known one. Relations of that image then point to other objects"
            )

    def _note_id(self, value: Any, image: _Image | None) -> bool:
        """Remember the image of an annotation, and return True if relations by id could mean an earlier annotation."""
        annotation_id = id_text(value)
        if not self._by_id or annotation_id is None:
            return False
        if annotation_id in self._owners:
            self._repeated.add(annotation_id)
            return True
        self._owners[annotation_id] = image, 0 if image is None else len(image.places)
        return False

    def _parse_annotation(self, where: str, row: Any) -> tuple[list[float], int]:
        if not isinstance(row, dict) or not row.keys() >= set(_ANNOTATION_FIELDS):
            raise InputError(f"{where}: must have {', '.join(_ANNOTATION_FIELDS)}, got {shown(row)}")
        box = row["bbox"]
        checked_corners(f"{where}: bbox", box, EXTENTS)
        return box, self.object_classes.number(f"{where}: category_id", row["category_id"])

    def _read_relations(self, by_id: Mapping[str, Any], images: Mapping[str, _Image | None]) -> None:
        named = 0
        for image_id, triplets in by_id.items():
            where = f"{self._rel}, {self._part}, image {image_id}"
            image = images.get(image_id)
            if image_id not in images:
                got = f"image ids must occur in {self._path.name}, got {image_id!r}"
                kind = f"image with relations that {self._path.name} lacks"
                self.findings.refuse(kind, f"{self._rel}, {self._part}: {got}")
                named += image_id in self._names
            elif not isinstance(triplets, list):
                got = f"must be a list of relations, got {type(triplets).__name__}"
                self.findings.refuse("image without a list of relations", f"{where}: {got}")
            elif image is None:
                self.findings.add("left out", "relation of a refused image", where, len(triplets))
            elif image.is_read:
                self._read_triplets(where, triplets, image)
        if named:
            self.findings.causes.append("rel.json has file names as keys, but must have image ids")
        if self._lowest == 1 and self._excess == 1:
            self.findings.causes.append("subject and object are counted from 1, but must be counted from 0")

    def _read_rel_annotations(self, rows: list[Any], images: Mapping[str, _Image | None]) -> None:
        for number, row in enumerate(rows):
            where = f"{self._path}, rel_annotations, row {number}"
            if not isinstance(row, dict) or not row.keys() >= set(_RELATION_FIELDS):
                got = f"must have {', '.join(_RELATION_FIELDS)}, got {shown(row)}"
                self.findings.refuse("relation with a malformed row", f"{where}: {got}")
                continue
            ids = [id_text(row[end]) or "" for end in ("subject_id", "object_id")]
            if missing := [annotation_id for annotation_id in ids if annotation_id not in self._owners]:
                got = f"subject_id and object_id must be ids of annotations, got {missing[0]!r}"
                self.findings.refuse("relation to a missing object", f"{where}: {got}")
                continue
            (image, subject), (other, object_) = (self._owners[annotation_id] for annotation_id in ids)
            if image is not None and not image.is_read:
                continue
            if not self._repeated.isdisjoint(ids):
                self.findings.add("left out", "relation of an id that several annotations have", where)
            elif "image_id" in row and images.get(id_text(row["image_id"]) or "") is not image:
                got = f"image_id must be that of its objects, got {shown(row)}"
                self.findings.refuse("relation with another image than its objects", f"{where}: {got}")
            elif image is not other:
                got = f"subject and object must be in the same image, got {shown(row)}"
                self.findings.refuse("relation between objects of two images", f"{where}: {got}")
            elif image is None:
                self.findings.add("left out", "relation of a refused image", where)
            else:
                self._read_triplet(where, [subject, object_, row["predicate_id"]], image)

    def _read_triplets(self, where: str, triplets: list[Any], image: _Image) -> None:
        last = len(image.places) - 1
        for number, triplet in enumerate(triplets):
            row = f"{where}, row {number}"
            if not isinstance(triplet, list) or len(triplet) != 3 or any(type(v) is not int for v in triplet[:2]):
                got = f"must be [subject, object, predicate], got {shown(triplet)}"
                self.findings.refuse("relation with a malformed row", f"{row}: {got}")
                continue
            self._lowest = min(self._lowest, *triplet[:2])
            self._excess = max(self._excess, max(triplet[:2]) - last)
            if not 0 <= min(triplet[:2]) <= max(triplet[:2]) <= last:
                got = f"objects must be from 0 to {last}, got {triplet[:2]}"
                self.findings.refuse("relation to a missing object", f"{row}: {got}")
            else:
                self._read_triplet(row, triplet, image)

    def _read_triplet(self, row: str, triplet: list[Any], image: _Image) -> None:
        try:
            predicate = self._predicates.number(f"{row}: predicate", triplet[2])
        except InputError as error:
            self.findings.refuse("relation with an unknown predicate", str(error))
            return
        subject, object_ = (image.places[place] for place in triplet[:2])
        if subject is None or object_ is None:
            self.findings.add("left out", "relation of a refused object", row)
        else:
            image.relations.append((subject, object_, predicate))


def _file(root: Path, split: Split) -> Path | None:
    """Return the path of a split's file, or None if there is none."""
    paths = [root / f"{FILES[split]}.json", *(root / name / "_annotations.coco.json" for name in FOLDERS[split])]
    found = [path for path in paths if path.exists()]
    if len(found) > 1:
        raise InputError(f"{root}: must have one file of the {split} split, but has {' and '.join(map(str, found))}")
    return found[0] if found else None


def _check_object(path: Path, content: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """Return the content of a JSON file if it is an object that has a list or an object for each of some keys."""
    if missing := [name for name in kinds if not isinstance(content, dict) or name not in content]:
        raise InputError(
            f"{path}: must have {', '.join(kinds)}, but lacks {', '.join(missing)} (an empty one is allowed)"
        )
    for name, kind in kinds.items():
        if not isinstance(content[name], kind):
            wanted = "a list" if kind is list else "a JSON object with image ids as keys"
            raise InputError(f"{path}: {name} must be {wanted}, got {type(content[name]).__name__}")
    return content
