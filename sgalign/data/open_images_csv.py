"""A reader of Open Images' CSV files of visual relationships, which have millions of rows."""

from __future__ import annotations

import csv
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sgalign.data.class_names import Classes, read_classes
from sgalign.data.findings import Findings, warn
from sgalign.data.image_files import ImageFiles
from sgalign.data.images import Size, image_size
from sgalign.data.records import Record
from sgalign.data.splits import SPLITS, Split
from sgalign.errors import InputError, shown
from sgalign.files import check_regular
from sgalign.numbers import parse_number

ATTRIBUTE = "is"  # label of the rows that say an attribute of one object, such as "table is wooden"
UNKNOWN_SIZE = (1024, 1024)  # Open Images' files have no sizes
_PIXELS = f"{UNKNOWN_SIZE[0]} x {UNKNOWN_SIZE[1]} pixels"
DESCRIPTIONS = "class-descriptions-boxable.csv"
_BOXES = [["XMin1", "YMin1", "XMax1", "YMax1"], ["XMin2", "YMin2", "XMax2", "YMax2"]]
_COLUMNS = ["ImageID", "RelationshipLabel", "LabelName1", *_BOXES[0], "LabelName2", *_BOXES[1]]
_HEADERS = {"labelname", "id", "mid"}  # first words of a header; older files of class descriptions have no header
_WIDTH = 12  # numbers that are kept of a row: image, predicate, and twice the class with its box


def csv_files(root: Path) -> dict[Split, Path]:
    """Return the files of relationships in a folder by split.

    Raises:
        ValueError: if a split has several files.
    """
    files: dict[Split, Path] = {}
    for path in _found(root, "*-vrd.csv"):
        for split in SPLITS:
            if split in path.name.split("-"):
                if split in files:
                    raise InputError(f"{root}: must have one {split} file, but has {files[split].name} and {path.name}")
                files[split] = path
    return files


def read_class_descriptions(root: Path) -> Classes:
    """Return the object classes of a folder, in the order of its file of class descriptions.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if there are several, or if a row is malformed.
    """
    paths = _found(root, "*class-descriptions*.csv")
    paths = [path for path in paths if "boxable" in path.name] or paths
    if not paths:
        raise FileNotFoundError(
            f"{root / DESCRIPTIONS} not found: download it, or oidv7-class-descriptions-boxable.csv, from Open Images"
        )
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise InputError(f"{root}: must have one file of class descriptions, but has {names}; remove all but one")
    entries = []
    for number, (line, row) in enumerate(_rows(paths[0])):
        if len(row) != 2:
            raise InputError(f"{paths[0]}, line {line}: must have the id and the name of a class, got {shown(row)}")
        if number > 0 or row[0].lower() not in _HEADERS:
            entries.append((row[0], row[1]))
    if entries:
        _warn_of_cut(paths[0])
    return read_classes(str(paths[0]), entries)


def read_predicates(root: Path, files: Iterable[Path]) -> Classes:
    """Return the predicates of a folder's triplets, or without a file of triplets those of all relationships, sorted.

    All splits of a folder therefore number them in the same way.
    """
    triplets = _found(root, "*relationship-triplets*.csv")
    paths = triplets or sorted(files)
    rows = (values for path in paths for _, values in _values(path, ["RelationshipLabel"]) if values is not None)
    labels = {label for (label,) in rows if label.strip() and label != ATTRIBUTE}
    for path in triplets:
        _warn_of_cut(path)
    where = ", ".join(map(str, paths))
    return read_classes(where, ((label, label) for label in sorted(labels)), has_background=False)


class Relationships:
    """The rows of a CSV file, as numbers in one array.

    Attributes:
        names: file name of each image, in the order of their first rows.
    """

    def __init__(self, path: Path, objects: Classes, predicates: Classes, findings: Findings) -> None:
        self._path, self._objects, self._predicates, self._findings = path, objects, predicates, findings
        self._ids = {number: class_id for class_id, number in objects.numbers.items()}
        images: dict[str, int] = {}
        numbers = array("d")
        for line, values in _values(path, _COLUMNS):
            where = f"{path}, line {line}"
            try:
                if values is None:
                    raise InputError(f"{where}: must have as many values as the first line")
                if not values[0]:
                    raise InputError(f"{where}: must have an ImageID, got ''")
                image = images.setdefault(values[0], len(images))
                numbers.extend((image, *self._parse(where, values)))
            except InputError as error:
                findings.refuse("relation with a malformed row", str(error))
        self.names = [f"{image_id}.jpg" for image_id in images]
        if not _has_end(path):
            findings.add("found", "last line without an end, which may be cut short", str(path))
        self._rows = np.frombuffer(numbers).reshape(-1, _WIDTH)

    def records(self, wanted: Sequence[bool], files: ImageFiles) -> Iterator[Record]:
        """Yield the wanted images. Objects of an image with the same class and box are one object."""
        order = np.argsort(self._rows[:, 0], kind="stable")
        ends = np.searchsorted(self._rows[order, 0], np.arange(1, len(self.names) + 1))
        start = 0
        for name, is_wanted, end in zip(self.names, wanted, ends, strict=True):
            if is_wanted:
                yield self._record(name, self._size(name, files), self._rows[order[start:end]].tolist())
            start = end

    def _parse(self, where: str, values: Sequence[str]) -> list[float]:
        """Return the numbers of a row without its image. The predicate of an attribute is 0, and its object too."""
        subject = self._parse_object(f"{where}, object 1", values[2], values[3:7])
        if values[1] == ATTRIBUTE:
            return [0, *subject, *[0] * 5]
        object_ = self._parse_object(f"{where}, object 2", values[7], values[8:])
        return [_number(self._predicates, f"{where}: RelationshipLabel", values[1]), *subject, *object_]

    def _parse_object(self, where: str, label: str, texts: Sequence[str]) -> list[float]:
        try:
            box = [parse_number(text) for text in texts]
        except ValueError:
            box = []
        if not box or not all(0 <= value <= 1 for value in box):  # also true for NaN
            raise InputError(f"{where}: its box must be 4 fractions from 0 to 1: XMin, YMin, XMax, YMax, got {texts}")
        if not (box[2] > box[0] and box[3] > box[1]):
            raise InputError(f"{where}: its box XMin, YMin, XMax, YMax must have a width and a height, got {box}")
        return [_number(self._objects, f"{where}: LabelName", label), *box]

    def _size(self, name: str, files: ImageFiles) -> Size:
        """Return the size of an image in pixels."""
        path = files.find(name)
        if path is None:
            self._findings.add("found", f"image of unknown size, taken as {_PIXELS}", f"{name}: there is no image file")
            return UNKNOWN_SIZE
        try:
            return image_size(path)
        except InputError as error:
            self._findings.add("found", f"image that cannot be read, taken as {_PIXELS}", str(error))
            return UNKNOWN_SIZE

    def _record(self, name: str, size: Size, rows: Sequence[Sequence[float]]) -> Record:
        objects: dict[tuple[float, ...], int] = {}
        relations = []
        for _, predicate, *ends in rows:
            subject = objects.setdefault(tuple(ends[:5]), len(objects))
            if predicate:
                object_ = objects.setdefault(tuple(ends[5:]), len(objects))
                relations.append((subject, object_, self._predicates.names[int(predicate)]))
        self._findings.add("left out", "attribute of an object", count=len(rows) - len(relations))
        width, height = size
        boxes = [
            (self._ids[int(label)], [x1 * width, y1 * height, x2 * width, y2 * height])
            for label, x1, y1, x2, y2 in objects
        ]
        return Record(f"{self._path}, image {name!r}", name, size, boxes, relations)


def _found(root: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern, without hidden ones, which macOS adds to archives."""
    return sorted(path for path in root.glob(pattern) if not path.name.startswith("."))


def _has_end(path: Path) -> bool:
    """Return True if the last line of a file, which is not empty, has an end. A cut may have removed it."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _warn_of_cut(path: Path) -> None:
    if not _has_end(path):
        warn(f"{path}: the last line has no end, so the file may be cut short")


def _number(classes: Classes, where: str, class_id: str) -> int:
    return classes.numbers.get(class_id) or classes.number(where, class_id)  # the method raises an error


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the values of each row of a CSV file."""
    check_regular(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            yield from ((rows.line_num, row) for row in rows if row)
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: must be a CSV file, but is not one or is cut short ({error})") from error


def _values(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str] | None]]:
    """Yield the line number of each row and its values in some columns, or None if a value is missing or too many."""
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if wrong := [column for column in columns if header.count(column) != 1]:
        got = f"lacks {', '.join(wrong)}" if wrong[0] not in header else f"has {wrong[0]} twice"
        raise InputError(f"{path}: the first line must name the columns, each once, but {got}: {shown(header)}")
    places = [header.index(column) for column in columns]
    for line, row in rows:
        yield line, [row[place] for place in places] if len(row) == len(header) else None
