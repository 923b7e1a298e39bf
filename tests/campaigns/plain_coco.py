"""A slow reader of COCO files with relations in plain Python, as those of `plain_readers.py`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from plain_values import (
    Classes,
    Expected,
    Options,
    corners,
    dict_of,
    held_out,
    is_int,
    is_path,
    json_of,
    must,
    only,
    size_of,
    text_of,
)


def coco(root: Path, options: Options) -> Expected:
    """Read COCO files with relations inside or in rel.json."""
    folders = {"train": ["train"], "validation": ["val", "valid"], "test": ["test"]}
    has_validation = _coco_file(root, folders["validation"]) is not None
    if has_validation:
        must(options.wanted is None and options.choice == "hash")
    holds_out = options.split != "test" and not has_validation
    of_file = folders["train" if holds_out else options.split]
    path = _coco_file(root, of_file)
    must(path)
    content = json_of(path, dict)  # type: ignore[arg-type]
    must(all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories")))
    beside = (root / "rel.json").exists()
    source = json_of(root / "rel.json", dict) if beside else content
    must(not (beside and content.get("rel_annotations")) and isinstance(source.get("rel_categories"), list))
    given = source.get(of_file[0] if beside else "rel_annotations")
    must(isinstance(given, dict if beside else list))
    objects = Classes((None, entry) for entry in content["categories"])
    predicates = Classes(enumerate(source["rel_categories"]))
    expected = Expected(objects.names, predicates.names)
    reader = _Coco(expected, objects, predicates, beside)
    reader.add_images(content["images"])
    reader.read = list(reader.valid)
    if holds_out:
        marks = held_out([row["file_name"] for row in reader.valid.values()], options, 5000)
        reader.read = [key for key, mark in zip(reader.valid, marks) if mark == (options.split == "validation")]
    reader.add_annotations(content["annotations"])
    if beside:
        reader.relate_by_place(given)
    else:
        reader.relate_by_id(given)
    for key in reader.read:
        row, kept = reader.valid[key], list(reader.found[key].values())
        size = size_of(row["width"], row["height"])
        boxes, labels = [box for box, _ in kept], [label for _, label in kept]
        expected.graphs.append((row["file_name"], *size, boxes, labels, reader.relations[key]))  # type: ignore[misc]
    return expected


def _coco_file(root: Path, folders: list[str]) -> Path | None:
    return only([root / f"{folders[0]}.json", *(root / folder / "_annotations.coco.json" for folder in folders)])


class _Coco:
    """The tables of a COCO file."""

    def __init__(self, expected: Expected, objects: Classes, predicates: Classes, beside: bool) -> None:
        self.expected, self.objects, self.predicates, self.beside = expected, objects, predicates, beside
        self.images: dict[str, dict | None] = {}  # None for an image that is refused
        self.valid: dict[str, dict] = {}
        self.read: list[str] = []  # images of the split
        self.by_id: dict[str, list[tuple[str | None, int]]] = {}  # image and place of the annotations with an id
        self.counts: Counter[str | None] = Counter()  # annotations of each image
        self.found: dict[str, dict[int, tuple]] = {}  # box and label of the objects of each image by place
        self.relations: dict[str, list[list[int]]] = {}

    def add_images(self, rows: list) -> None:
        """Add images. All images with the same id are refused, because their annotations cannot be told apart."""
        names = set()
        for row in rows:
            key, name = text_of(dict_of(row).get("id")), dict_of(row).get("file_name")
            size = size_of(dict_of(row).get("width"), dict_of(row).get("height"))
            if key is None:
                self.expected.lose("refused", "image")
            elif key in self.images or not is_path(name) or size is None or name in names:
                self.expected.lose("refused", "image")
                self.expected.lose("left out", "image", int(self.images.get(key) is not None))
                self.images[key] = None
            else:
                names.add(name)
                self.images[key] = row
        self.valid = {key: row for key, row in self.images.items() if row is not None}

    def add_annotations(self, rows: list) -> None:
        """Add the objects of the images of the split."""
        self.found = {key: {} for key in self.read}
        self.relations = {key: [] for key in self.read}
        for row in rows:
            key, own = text_of(dict_of(row).get("image_id")), text_of(dict_of(row).get("id"))
            must(key is not None or not self.beside)
            place, repeats = self.counts[key], own in self.by_id
            if key is None or key not in self.images:
                self.expected.lose("refused", "object")
            elif key not in self.valid:
                self.expected.lose("left out", "object")
            elif key in self.read:
                box, label = corners(row.get("bbox"), extents=True), self.objects.number(row.get("category_id"))
                if box is None or label is None or repeats:
                    self.expected.lose("refused", "object")
                else:
                    self.found[key][place] = box, label
            if own is not None and not self.beside:
                self.by_id.setdefault(own, []).append((key if key in self.valid else None, place))
            self.counts[key] += 1

    def relate_by_place(self, given: dict) -> None:
        """Add the relations of rel.json, which count the annotations of an image."""
        for key, rows in given.items():
            if key not in self.images or not isinstance(rows, list):
                self.expected.lose("refused", "image")
            elif key not in self.valid:
                self.expected.lose("left out", "relation", len(rows))
            elif key in self.read:
                for row in rows:
                    ends = row[:2] if isinstance(row, list) and len(row) == 3 else [None]
                    if all(is_int(end) and 0 <= end < self.counts[key] for end in ends):
                        self.relate(key, *row)
                    else:
                        self.expected.lose("refused", "relation")

    def relate_by_id(self, given: list) -> None:
        """Add the relations of the file itself, which refer to ids of annotations."""
        for row in given:
            ids = [text_of(dict_of(row).get(end)) for end in ("subject_id", "object_id")]
            if not all(own in self.by_id for own in ids) or "predicate_id" not in row:
                self.expected.lose("refused", "relation")
                continue
            (key, subject), (other, target) = (self.by_id[str(own)][0] for own in ids)
            if key is not None and key not in self.read:
                continue
            named = text_of(row["image_id"]) if "image_id" in row else key
            if any(len(self.by_id[str(own)]) > 1 for own in ids):
                self.expected.lose("left out", "relation")
            elif (named if named in self.valid else None) != key or key != other:
                self.expected.lose("refused", "relation")
            elif key is None:
                self.expected.lose("left out", "relation")
            else:
                self.relate(key, subject, target, row["predicate_id"])

    def relate(self, key: str, subject: int, target: int, value: Any) -> None:
        """Add a relation between two annotations of an image, given by their places."""
        number, places = self.predicates.number(value), list(self.found[key])
        if number is None:
            self.expected.lose("refused", "relation")
        elif subject in places and target in places:
            self.relations[key].append([places.index(subject), places.index(target), number])
        else:
            self.expected.lose("left out", "relation")
