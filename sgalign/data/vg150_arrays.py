"""The arrays and the class names in the files of VG150's layout, with the checks of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from sgalign.data.box_checks import LARGEST
from sgalign.data.class_names import Classes, read_classes
from sgalign.data.findings import EXAMPLES, Findings
from sgalign.errors import InputError
from sgalign.files import HDF5_DAMAGE, check_regular, read_array, read_json

REMEDY = "download or write it again"
NO_NUMBER = -(1 << 62)  # stands for a value that is not a whole number, or is too large to be one
COLUMNS = ("labels", "predicates", "split")  # [N, 1] in the official file
RANGES = ("box", "rel")


class Arrays(NamedTuple):
    """The arrays of a file with N boxes, M relations and I images.

    Attributes:
        path: the file.
        numbers: center x, center y, width and height, int64 or float64 `[N, 4]`.
        long_side: length of an image's long side in the unit of the boxes.
        labels: object classes from 1, int64 `[N]`.
        pairs: rows of subject and object among all boxes, int64 `[M, 2]`.
        predicates: predicates from 1, int64 `[M]`.
        split: 0 for train, 1 for validation, 2 for test, int64 `[I]`.
        first: first row of each image's boxes ("box") and relations ("rel"), int64 `[I]`, or -1.
        last: last row, inclusive, or -1.
    """

    path: Path
    numbers: np.ndarray
    long_side: int
    labels: np.ndarray
    pairs: np.ndarray
    predicates: np.ndarray
    split: np.ndarray
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]

    def corners(self) -> np.ndarray:
        """Return x1, y1, x2, y2 in the unit of the boxes. Integers truncate halves, as in the public code."""
        half = self.numbers[:, 2:] / 2
        low = (self.numbers[:, :2] - half).astype(self.numbers.dtype)
        return np.concatenate([low, low + self.numbers[:, 2:]], axis=1)

    def rows(self, what: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of some images' boxes ("box") or relations ("rel"), and the image of each row."""
        first, last = self.first[what][images], self.last[what][images]
        counts = np.where(first >= 0, last - first + 1, 0)
        starts = np.repeat(first - (np.cumsum(counts) - counts), counts)
        return np.arange(counts.sum()) + starts, np.repeat(images, counts)

    def refused_boxes(self, classes: int, rows: np.ndarray, findings: Findings) -> np.ndarray:
        """Return a mask of these rows of boxes that must be refused, and record them.

        Args:
            classes: number of object classes without the background.
            rows: rows of boxes.
            findings: the record.
        """
        unknown = _outside(self.labels[rows], 1, classes)
        must = f"array labels: must be from 1 to {classes}"
        self._refuse(findings, "object with an unknown class", must, rows[unknown], self.labels)
        numbers = self.numbers[rows]
        empty = ~((numbers[:, 2:] > 0) & (abs(numbers) <= LARGEST).all(1, keepdims=True)).all(1)  # also for NaN
        must = f"array boxes_{self.long_side}: boxes must be at most {LARGEST}, with a width and a height above 0"
        self._refuse(findings, "object without an extent", must, rows[empty & ~unknown], self.numbers)
        return unknown | empty

    def refused_relations(self, classes: int, rows: np.ndarray, images: np.ndarray, findings: Findings) -> np.ndarray:
        """Return a mask of these rows of relations that must be refused, and record them.

        Args:
            classes: number of predicates without the background.
            rows: rows of relations.
            images: image of each row.
            findings: the record.
        """
        unknown = _outside(self.predicates[rows], 1, classes)
        must = f"array predicates: must be from 1 to {classes}"
        self._refuse(findings, "relation with an unknown predicate", must, rows[unknown], self.predicates)
        # An image without boxes has the range from -1 to -1, which no pair with a valid row can be in.
        first, last = self.first["box"][images, None], self.last["box"][images, None]
        astray = (_outside(self.pairs[rows], first, last) | (self.pairs[rows] < 0)).any(1)
        must = "array relationships: must refer to boxes of the relation's image"
        self._refuse(findings, "relation to a missing object", must, rows[astray & ~unknown], self.pairs)
        return unknown | astray

    def refused_images(self, findings: Findings) -> np.ndarray:
        """Return a mask of the images whose split or rows must be refused, bool `[I]`, and record them."""
        refused = _outside(self.split, 0, 2)
        must = "array split: must be from 0 to 2"
        self._refuse(findings, "image with an unknown split", must, np.flatnonzero(refused), self.split)
        for what, length in (("box", len(self.labels)), ("rel", len(self.predicates))):
            first, last = self.first[what], self.last[what]
            none = (first == -1) & (last == -1)
            wrong = ~none & ((first < 0) | (last < first) | (last >= length)) & ~refused
            must = f"arrays img_to_first_{what} and img_to_last_{what}: must be ascending and from 0 to {length - 1}"
            ends = np.stack([first, last], axis=1)
            self._refuse(findings, f"image with impossible rows in img_to_*_{what}", must, np.flatnonzero(wrong), ends)
            refused = refused | wrong
            shared = self._shares_rows(what, ~refused)
            must = f"arrays img_to_first_{what} and img_to_last_{what}: must not share rows with another image"
            self._refuse(
                findings, f"image with rows of another image in img_to_*_{what}", must, np.flatnonzero(shared), ends
            )
            refused = refused | shared
        return refused

    def _shares_rows(self, what: str, images: np.ndarray) -> np.ndarray:
        """Return a mask of these images whose first row lies within the rows of another image, bool `[I]`."""
        first = np.where(images, self.first[what], -1)
        order = np.argsort(first, kind="stable")
        order = order[first[order] >= 0]
        shared = np.zeros_like(images)
        shared[order[1:]] = first[order[1:]] <= np.maximum.accumulate(self.last[what][order])[:-1]
        return shared

    def _refuse(self, findings: Findings, kind: str, must: str, rows: np.ndarray, values: np.ndarray) -> None:
        examples = []
        for row in rows[:EXAMPLES].tolist():
            got = str(values[row].tolist()).replace(str(NO_NUMBER), "no whole number")
            examples.append(f"{self.path}, {must}, got {got} in row {row}; {REMEDY}")
        findings.add("refused", kind, examples, len(rows))


def _outside(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    return (values < low) | (values > high)


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of a file.

    Numbers of any width, sign and byte order keep their value. An image has no boxes or no relations if its first and
    last row are both -1, or if its last row is just before its first one.

    Raises:
        ValueError: if the file is not HDF5 or is cut short, or if an array is missing, is not numeric or has the wrong
            shape.
    """
    arrays, boxes, long_side = _load(path)
    for name in COLUMNS:
        if arrays[name].shape[1:] not in ((), (1,)):
            raise InputError(f"{path}, array {name}: must be [N] or [N, 1], got {list(arrays[name].shape)}; {REMEDY}")
        arrays[name] = arrays[name].reshape(-1)
    count, relations, images = (len(arrays[name]) for name in COLUMNS)
    for name in (f"boxes_{long_side}", "relationships"):
        rows, width, array = (count, 4, boxes) if name != "relationships" else (relations, 2, arrays[name])
        if array.shape != (rows, width) and (rows or array.size):  # an empty array may have any shape
            raise InputError(f"{path}, array {name}: must be [{rows}, {width}], got {list(array.shape)}; {REMEDY}")
    ends = {}
    for end in ("first", "last"):
        for what in RANGES:
            name = f"img_to_{end}_{what}"
            ends[end, what] = _whole(arrays[name].reshape(-1))
            if len(ends[end, what]) != images:
                raise InputError(f"{path}, array {name}: must have {images} rows to match split; {REMEDY}")
    for what in RANGES:
        none = ends["last", what] == ends["first", what] - 1
        for end in ("first", "last"):
            ends[end, what] = np.where(none, -1, ends[end, what])
    whole = {name: _whole(arrays[name]) for name in (*COLUMNS, "relationships")}
    return Arrays(
        path,
        (boxes.astype(np.float64) if boxes.dtype.kind == "f" else _whole(boxes)).reshape(-1, 4),
        long_side,
        whole["labels"],
        whole["relationships"].reshape(-1, 2),
        whole["predicates"],
        whole["split"],
        {what: ends["first", what] for what in RANGES},
        {what: ends["last", what] for what in RANGES},
    )


def _load(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Return the arrays of the file, its boxes, and the length of an image's long side in the unit of the boxes."""
    wanted = {*COLUMNS, "relationships", *(f"img_to_{end}_{what}" for end in ("first", "last") for what in RANGES)}
    check_regular(path)
    try:
        with h5py.File(path, "r") as file:
            if missing := sorted(wanted - set(file)):
                raise InputError(f"{path}: must have the arrays {', '.join(missing)}; {REMEDY}")
            sides = [side for side in (1024, 512) if f"boxes_{side}" in file]
            if not sides:
                raise InputError(f"{path}: must have the array boxes_1024 or boxes_512; {REMEDY}")
            arrays = {name: _numbers(path, name, file[name]) for name in (*sorted(wanted), f"boxes_{sides[0]}")}
    except InputError:
        raise
    except HDF5_DAMAGE as error:
        raise InputError(f"{path}: must be an HDF5 file, but is not one or is cut short ({error}); {REMEDY}") from error
    return arrays, arrays.pop(f"boxes_{sides[0]}"), sides[0]


def _numbers(path: Path, name: str, array: h5py.Dataset | h5py.Group) -> np.ndarray:
    kind = getattr(array, "dtype", np.dtype(object)).kind
    if kind not in "iuf" or not array.shape:
        raise InputError(f"{path}, array {name}: must be numeric, got {getattr(array, 'dtype', 'a group')}; {REMEDY}")
    try:
        return read_array(array)
    except HDF5_DAMAGE as error:
        raise InputError(f"{path}, array {name}: must be complete, but {error}; {REMEDY}") from error


def _whole(array: np.ndarray) -> np.ndarray:
    """Return the numbers as int64. A number that is not whole or is too large becomes `NO_NUMBER`."""
    if array.dtype.kind == "f":
        array = array.astype(np.float64)  # narrower types cannot hold the limits below
    with np.errstate(invalid="ignore"):  # the remainder of infinity
        valid = (array > NO_NUMBER) & (array < -NO_NUMBER) & (array % 1 == 0)
    return np.where(valid, np.where(valid, array, 0).astype(np.int64), NO_NUMBER)


def read_names(root: Path) -> tuple[Classes, Classes]:
    """Return the object classes and the predicates of the file VG-SGG-dicts*.json.

    Names come from `idx_to_label` and `idx_to_predicate`, or from `label_to_idx` and `predicate_to_idx`. Number 0 may
    be the background.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the names are malformed, or if both forms are there and differ.
    """
    path = only(root, "VG-SGG-dicts-with-attri.json", "VG-SGG-dicts.json", "*dicts*.json")
    dicts = read_json(path)
    objects, predicates = (_classes(path, dicts, what) for what in ("label", "predicate"))
    return objects, predicates


def _classes(path: Path, dicts: Any, what: str) -> Classes:
    given = dicts if isinstance(dicts, dict) else {}
    forward, backward = f"idx_to_{what}", f"{what}_to_idx"
    found = []
    for key in (forward, backward):
        if isinstance(given.get(key), dict):
            entries = [item if key == forward else item[::-1] for item in given[key].items()]
            found.append(read_classes(f"{path}, {key}", entries))
    if not found:
        raise InputError(f"{path}: must have {forward} or {backward}, a JSON object; {REMEDY}")
    if found[0] != found[-1]:
        raise InputError(f"{path}: {forward} and {backward} must agree, but they differ; {REMEDY}")
    classes = found[0]
    if any(class_id != str(number) for class_id, number in classes.numbers.items()):
        ids = ", ".join(list(classes.numbers)[:3])
        raise InputError(f"{path}, {forward}: numbers must be 1, 2, 3 and so on, got {ids}, ...; {REMEDY}")
    return classes


def only(root: Path, *patterns: str) -> Path:
    """Return the file in a folder that matches the first pattern for which there is one.

    Raises:
        FileNotFoundError: if no file matches.
        ValueError: if several files match.
    """
    for pattern in patterns:
        found = sorted(root.glob(pattern))
        if len(found) > 1:
            raise InputError(f"{root}: must have one file {pattern}, but has {', '.join(path.name for path in found)}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{root}: must have {' or '.join(patterns)}")
