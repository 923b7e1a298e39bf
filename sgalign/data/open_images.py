"""The visual relationships of Open Images (Kuznetsova et al., IJCV 2020), as CSV files or as PySGG's JSON files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sgalign.data.class_names import Classes, read_classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.images import image_suffixes
from sgalign.data.open_images_csv import Relationships, csv_files, read_class_descriptions, read_predicates
from sgalign.data.records import Record, RecordDataset
from sgalign.data.splits import SPLITS, Split, ValidationChoice, in_split, split_file, split_files, splits_from
from sgalign.errors import InputError, shown
from sgalign.files import read_json

_FOLDER = "annotations"
_JSON_FILES: dict[Split, str] = {
    "train": "vrd-train-anno.json",
    "validation": "vrd-val-anno.json",
    "test": "vrd-test-anno.json",
}
_LISTS = ("img_size", "bbox", "det_labels", "rel")


class OpenImagesDataset(RecordDataset):
    """Open Images' scene graphs. Version 6 has 601 object classes and 30 predicates in the public JSON files.

    The folder has one of two forms:

    - The official CSV files, such as `oidv6-train-annotations-vrd.csv`. A file belongs to a split if its name ends in
      `-vrd.csv` and has the word train, validation or test. Boxes are fractions of the image's width and height. The
      classes are those of `class-descriptions-boxable.csv`, or of the other file of class descriptions in the folder,
      in its order. The predicates are those of `oidv6-relationship-triplets.csv`, or else of all `-vrd.csv` files,
      sorted. Rows with the label `is` are attributes of one object. The object is read, the attribute is left out.
      Objects of an image with the same class and box become one object. The size of an image comes from its file. An
      image without a file, or whose file cannot be read, is taken as 1024 x 1024 pixels. Its proportions are then
      unknown.
    - The JSON files of PySGG, SGTR and BGNN: `vrd-train-anno.json`, `vrd-val-anno.json`, `vrd-test-anno.json` and
      `categories_dict.json`, in this folder or in `annotations/`. Boxes are x1, y1, x2, y2 in pixels. Classes,
      predicates and objects start at 0 in the files.

    Nothing is filtered. PySGG leaves out images without boxes or without relations, and draws one relation of each pair
    in training.

    Args:
        root: folder of the files. Images are optional. They are called `ID.jpg` and lie in `images/`, `train/`,
            `validation/`, `test/` or beside the files.
        split: "train", "validation" or "test". If there is no validation file, the validation split is held out from
            the training file.
        validation_images: number of images to hold out. If None, 5000, but at most a fifth of the training images. It
            must be None if there is a validation file.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.
        findings: the rows that were left out, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed, or if the folder has files of both forms. The error names the file and the
            line or row.
    """

    annotation_files = (
        *("*-vrd.csv", "*class-descriptions*.csv", "*relationship-triplets*.csv"),
        *(f"{place}{name}" for place in ("", f"{_FOLDER}/") for name in ("vrd-*-anno.json", "categories_dict.json")),
    )

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        validation_images: int | None = None,
        validation_choice: ValidationChoice = "hash",
        bad_rows: BadRows = "error",
    ) -> None:
        self.root = Path(root)
        tables, lists = csv_files(self.root), _json_files(self.root)
        if tables and lists:
            names = ", ".join(str(path) for path in [*tables.values(), *lists.values()])
            raise InputError(f"{self.root}: must have either CSV files or JSON files, but has {names}")
        files = tables or lists
        path = split_file(self.root, files, split, validation_images, validation_choice)
        self.findings = Findings(f"{path}, {split}")
        folders = dict.fromkeys((split, "images", *SPLITS, ""))  # the split's own folder comes first
        self._files = ImageFiles([self.root / name for name in folders])
        rows: Relationships | _Entries
        if tables:
            self.object_classes, self._predicates = (
                read_class_descriptions(self.root),
                read_predicates(self.root, tables.values()),
            )
            rows = Relationships(path, self.object_classes, self._predicates, self.findings)
        else:
            self.object_classes, self._predicates = _categories(path.parent / "categories_dict.json")
            rows = _Entries(path, self.findings)
        wanted = in_split(rows.names, files, split, validation_images, validation_choice)
        self._read(rows.records(wanted, self._files), bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        return splits_from(csv_files(root) | _json_files(root))


class _Entries:
    """The images of a JSON file that have a valid entry.

    Attributes:
        names: file name of each image.
    """

    def __init__(self, path: Path, findings: Findings) -> None:
        content = read_json(path)
        if not isinstance(content, list):
            raise InputError(f"{path}: must be a list with an entry per image, got {shown(content)}")
        self._rows: list[tuple[str, dict[str, Any]]] = []
        for number, row in enumerate(content):
            where = f"{path}, row {number}"
            if _is_valid(row):
                self._rows.append((where, row))
            else:
                must = f"must have the text img_fn and the lists {', '.join(_LISTS)}, with 2 numbers in img_size"
                got = f"{must} and as many det_labels as boxes, got {shown(row)}"
                findings.refuse("image with a malformed entry", f"{where}: {got}")
        names = [row["img_fn"] for _, row in self._rows]
        self.names = [name if Path(name).suffix.lower() in image_suffixes() else f"{name}.jpg" for name in names]

    def records(self, wanted: Sequence[bool], files: ImageFiles) -> Iterator[Record]:
        for (where, row), name, is_wanted in zip(self._rows, self.names, wanted, strict=True):
            if is_wanted:
                width, height = row["img_size"]
                objects = list(zip(row["det_labels"], row["bbox"], strict=True))
                yield Record(where, name, (width, height), objects, row["rel"])


def _is_valid(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("img_fn"), str) or not row["img_fn"]:
        return False
    if not all(isinstance(row.get(key), list) for key in _LISTS):
        return False
    return len(row["img_size"]) == 2 and len(row["bbox"]) == len(row["det_labels"])


def _json_files(root: Path) -> dict[Split, Path]:
    return split_files(root, _FOLDER, _JSON_FILES)


def _categories(path: Path) -> tuple[Classes, Classes]:
    """Return the object classes and the predicates."""
    content = read_json(path)
    for key in ("obj", "rel"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: must be a JSON object with the lists obj and rel, got {shown(content)}")
    objects, predicates = (read_classes(f"{path}, {key}", enumerate(content[key])) for key in ("obj", "rel"))
    return objects, predicates
