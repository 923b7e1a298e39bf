"""Values and tables as the plain readers of data sets check them, and the content that they expect a data set to have.

The plain readers are slow and share no code with the package. Fuzzing compares the real readers with them.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

SPLITS = ["train", "validation", "test"]
LARGEST = 2**24  # float32 has every integer up to this one
BACKGROUNDS = "background bg norelation norel nopredicate noobject nothing none na".split()
Graph = tuple[str, int, int, list[list[float]], list[int], list[list[int]]]  # in the order of SceneGraph's fields


class Malformed(Exception):
    """An input that must be refused as a whole."""


@dataclass
class Options:
    """The options of a reader."""

    split: str
    wanted: int | None = None  # validation images
    choice: str = "hash"
    keep: str = "related"


@dataclass
class Expected:
    """The content that a data set must have. `lost` counts the missing rows by outcome and by noun."""

    objects: list[str]
    predicates: list[str]
    graphs: list[Graph] = field(default_factory=list)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)

    def lose(self, outcome: str, noun: str, count: int = 1) -> None:
        """Count rows that a data set must not load."""
        if count:
            self.lost[outcome, noun] += count

    @property
    def refused(self) -> bool:
        """True if a row must be refused."""
        return any(outcome == "refused" for outcome, _ in self.lost)


def must(condition: Any) -> None:
    """Raise Malformed unless a condition holds."""
    if not condition:
        raise Malformed


def json_of(path: Path, kind: type | None = None) -> Any:
    """Return the content of a JSON file, which must be of a kind, such as a list."""
    must(path.is_file())
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique)
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise Malformed from None
    must(kind is None or isinstance(content, kind))
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    must(len({key for key, _ in pairs}) == len(pairs))
    return dict(pairs)


def is_int(value: Any) -> bool:
    """Return True for an integer that is not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(value: Any) -> int | None:
    """Return the whole number that a number or a text stands for, or None."""
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if is_int(value) and abs(value) < 2**53 else None


def text_of(value: Any) -> str | None:
    """Return an id as text."""
    number = whole(value)
    return value if isinstance(value, str) else None if number is None else str(number)


def size_of(width: Any, height: Any) -> tuple[int, int] | None:
    """Return the size of an image, or None if it is impossible."""
    sides = whole(width), whole(height)
    return sides if all(side is not None and 1 <= side <= LARGEST for side in sides) else None  # type: ignore[return-value]


def is_path(name: Any) -> bool:
    """Return True for a path that stays in its folder."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts


def single(value: float) -> float:
    """Return the nearest number of float32."""
    return struct.unpack("f", struct.pack("f", value))[0]


def corners(box: Any, extents: bool) -> list[float] | None:
    """Return x1, y1, x2, y2 of a box as float32 has them, or None if it is impossible."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not all((is_int(v) or isinstance(v, float)) and abs(v) <= LARGEST for v in box):
        return None
    x, y, right, bottom = box
    if extents:
        if right <= 0 or bottom <= 0:
            return None
        right, bottom = x + right, y + bottom
    return [single(v) for v in (x, y, right, bottom)] if right > x and bottom > y else None


class Classes:
    """The classes of a file, by number and by id."""

    def __init__(self, entries: Iterable[tuple[Any, Any]], background: bool = True) -> None:
        named = []
        for key, entry in entries:
            if isinstance(entry, dict):
                key, entry = entry.get("id", key), entry.get("name")
            must(isinstance(entry, str) and entry.strip() and text_of(key) is not None)
            named.append((str(text_of(key)), entry))
        if all(re.fullmatch("-?[0-9]{1,16}", key) for key, _ in named):
            named.sort(key=lambda pair: int(pair[0]))
        ids, names = [key for key, _ in named], [name for _, name in named]
        must(len(set(ids)) == len(ids) and len(set(names)) == len(names))
        marks = [name == "__background__" or (background and _is_background(name)) for name in names]
        first = bool(background and marks and marks[0])
        must(not any(marks[1:] if first else marks) and len(names) > first)
        self.names = ["__background__", *names[first:]]
        self.numbers = {key: place + (not first) for place, key in enumerate(ids)}

    def number(self, value: Any) -> int | None:
        """Return the number of a class, or None for an unknown id and for the background."""
        key = text_of(value)
        return (self.numbers.get(key) or None) if key is not None else None


def _is_background(name: str) -> bool:
    return "".join(letter for letter in name if letter.isalnum()).lower() in BACKGROUNDS


def held_out(names: Sequence[str], options: Options, default: int) -> list[bool]:
    """Return True for each image of the validation split."""
    count = min(default, len(names) // 5) if options.wanted is None else options.wanted
    must(0 <= count <= len(names))
    places = list(range(len(names)))
    if options.choice == "hash":
        places.sort(key=lambda place: hashlib.sha256(names[place].encode()).hexdigest())
    return [place in places[:count] for place in range(len(names))]


def chosen(names: Sequence[str], has_validation: bool, options: Options) -> list[bool]:
    """Return True for each image of the split. Without a file of their own, validation images are training images."""
    if has_validation:
        must(options.wanted is None and options.choice == "hash")
    if has_validation or options.split == "test":
        return [True] * len(names)
    return [mark == (options.split == "validation") for mark in held_out(names, options, 5000)]


def only(paths: Iterable[Path]) -> Path | None:
    """Return the one file that exists, or None. Several files are malformed."""
    found = [path for path in paths if path.exists()]
    must(len(found) <= 1)
    return found[0] if found else None


def records(expected: Expected, objects: Classes, predicates: Classes, rows: Iterable[tuple], extents: bool) -> None:
    """Add images, each given as name, width, height, pairs of class id and box, and relations."""
    names = set()
    for name, width, height, annotated, relations in rows:
        size = size_of(width, height)
        if not is_path(name) or name in names or size is None:
            expected.lose("refused", "image")
            continue
        names.add(name)
        boxes, labels, places, kept = [], [], [], []
        for key, box in annotated:
            corner, label = corners(box, extents), objects.number(key)
            if corner is None or label is None:
                expected.lose("refused", "object")
                places.append(None)
            else:
                places.append(len(boxes))
                boxes.append(corner)
                labels.append(label)
        for row in relations:
            row = list(row) if isinstance(row, list | tuple) else []
            number = predicates.number(row[2]) if len(row) == 3 else None
            if number is None or not all(is_int(end) and 0 <= end < len(places) for end in row[:2]):
                expected.lose("refused", "relation")
            elif None in (ends := [places[end] for end in row[:2]]):
                expected.lose("left out", "relation")
            else:
                kept.append([*ends, number])
        expected.graphs.append((name, *size, boxes, labels, kept))


def dict_of(value: Any) -> dict:
    """Return an object as it is, and an empty one for any other value."""
    return value if isinstance(value, dict) else {}
