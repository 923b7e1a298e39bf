"""The Panoptic Scene Graph data set (PSG; Yang et al., ECCV 2022), with boxes instead of masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sgalign.data.class_names import id_text, read_classes
from sgalign.data.findings import BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.records import Record, RecordDataset
from sgalign.data.splits import Split, ValidationChoice, check_split, held_out
from sgalign.errors import InputError, shown
from sgalign.files import read_json

FILES = ("psg.json", "psg_train_val.json", "psg_val_test.json")
_KEYS = ("file_name", "width", "height", "image_id", "annotations", "relations")


class PSGDataset(RecordDataset):
    """PSG's scene graphs with 80 classes of things, 53 of stuff and 56 predicates, on 49k images of COCO.

    The file is `psg.json`, or one of the files of the PSG competition. It has `thing_classes`, `stuff_classes` and
    `predicate_classes`, which are lists of names, `test_image_ids`, and `data` with an entry per image: `file_name`,
    `width`, `height`, `image_id`, `annotations` (`category_id`, and `bbox` as x1, y1, x2, y2) and `relations` (subject,
    object, predicate). Classes, predicates and objects start at 0 in the file. Stuff follows things.

    The boxes of things and of stuff are read. Masks are not read: `segments_info` and the panoptic images are left out.
    Nothing is filtered. OpenPSG leaves out images without relations and repeated relations, and draws one relation of
    each pair in training.

    Args:
        root: folder of the file. Images are optional. Their names, such as `val2017/000000000139.jpg`, are paths in
            this folder, in its subfolders `coco/` or `images/`, or in a folder `coco/` beside it.
        split: "train", "validation" or "test". The images of `test_image_ids` are the test split. The validation split
            is held out from the others.
        validation_images: number of images to hold out. If None, 1000, but at most a fifth of the training images. Only
            images with relations are held out.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`. SGG-Benchmark takes the first 1000.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.
        findings: the rows that were left out, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is malformed. The error names the file and the row.
    """

    annotation_files = FILES

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
        self._path = _file(self.root)
        content = _content(self._path)
        names = content["thing_classes"] + content["stuff_classes"]
        self.object_classes = read_classes(f"{self._path}, thing_classes and stuff_classes", enumerate(names))
        self._predicates = read_classes(f"{self._path}, predicate_classes", enumerate(content["predicate_classes"]))
        self._files = ImageFiles([self.root, self.root / "coco", self.root / "images", self.root.parent / "coco"])
        self.findings = Findings(f"{self._path}, {split}")
        rows = self._rows(content)
        ids = {number: str(id_text(row["image_id"])) for number, row in rows.items()}
        test_ids = self._test_ids(content["test_image_ids"], set(ids.values()))
        if split == "test":
            chosen = [number for number in rows if ids[number] in test_ids]
        else:
            training = [number for number in rows if ids[number] not in test_ids]
            related = [number for number in training if rows[number]["relations"]]
            names = [str(rows[number]["file_name"]) for number in related]
            marks = held_out(names, validation_images, 1000, validation_choice, self._path)
            validation = {number for number, mark in zip(related, marks, strict=True) if mark}
            chosen = [number for number in training if (number in validation) == (split == "validation")]
        segments = [rows[number].get("segments_info") for number in chosen]
        masks = sum(len(of_image) for of_image in segments if isinstance(of_image, list))
        self.findings.add("left out", "mask of a segment", count=masks)
        self.image_names = {ids[number]: str(row["file_name"]) for number, row in rows.items()}
        self._read(self._records({number: rows[number] for number in chosen}), bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        return ["train", "validation", "test"] if any((root / name).exists() for name in FILES) else []

    def _rows(self, content: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """Return the entries of the images by their number in the file, without malformed ones."""
        rows: dict[int, dict[str, Any]] = {}
        known: set[str | None] = {None}  # an id that is neither a number nor text is refused like a repeated one
        for number, row in enumerate(content["data"]):
            where = f"{self._path}, data, row {number}"
            lacks = [key for key in _KEYS if not isinstance(row, dict) or key not in row]
            lists = [] if lacks else [row["annotations"], row["relations"]]
            if lacks or not all(isinstance(value, list) for value in lists):
                got = f"must have {', '.join(_KEYS)}, and lists of annotations and relations, got {shown(row)}"
                self.findings.refuse("image with a malformed entry", f"{where}: {got}")
            elif (image_id := id_text(row["image_id"])) in known:
                got = f"image_id must be a number or text that no other image has, got {row['image_id']!r}"
                self.findings.refuse("image with a malformed entry", f"{where}: {got}")
            else:
                known.add(image_id)
                rows[number] = row
        return rows

    def _test_ids(self, given: list[Any], known: set[str]) -> set[str]:
        """Return the ids of the test images, and record ids that no image has."""
        ids = [id_text(value) for value in given]
        where = f"{self._path}, test_image_ids"
        pairs = zip(given, ids, strict=True)
        wrong = [f"{where}: must be numbers or text, got {shown(value)}" for value, one in pairs if one is None]
        unknown = [f"{where}: {image_id!r}" for image_id in ids if image_id is not None and image_id not in known]
        self.findings.add("refused", "id of a test image that is neither a number nor text", wrong, len(wrong))
        # A file of PSG's competition has only some of the test images.
        self.findings.add("found", "id of a test image that no image has", unknown, len(unknown))
        return {image_id for image_id in ids if image_id is not None}

    def _records(self, rows: Mapping[int, dict[str, Any]]) -> Iterator[Record]:
        for number, row in rows.items():
            objects = [
                (a.get("category_id"), a.get("bbox")) if isinstance(a, dict) else (None, a) for a in row["annotations"]
            ]
            size = row["width"], row["height"]
            yield Record(f"{self._path}, data, row {number}", row["file_name"], size, objects, row["relations"])


def _file(root: Path) -> Path:
    """Return the first of PSG's files that the folder has."""
    for name in FILES:
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{root}: must have {' or '.join(FILES)}")


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for key in ("thing_classes", "stuff_classes", "predicate_classes", "test_image_ids", "data"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{path}: must be a JSON object with a list {key}, got {shown(content)}")
    return content
