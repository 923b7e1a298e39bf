"""A slow reader of VG150's files in plain Python, as those of `plain_readers.py`."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
from plain_values import (
    LARGEST,
    SPLITS,
    Classes,
    Expected,
    Malformed,
    Options,
    dict_of,
    held_out,
    is_path,
    json_of,
    must,
    only,
    single,
    size_of,
    text_of,
)


def vg150(root: Path, options: Options) -> Expected:
    """Read VG150's files."""
    name = next((n for n in ("VG-SGG-with-attri.h5", "VG-SGG.h5") if (root / n).exists()), None)
    path = root / name if name else only(root.glob("*.h5"))
    must(path)
    objects, predicates = _classes(root)
    arrays, side = _arrays(path)  # type: ignore[arg-type]
    labels, numbers, split = (arrays[key] for key in ("labels", "predicates", "split"))
    expected = Expected(objects, predicates)
    entries = json_of(root / "image_data.json", list)
    if len(entries) == len(split) + 4:
        corrupted = "1592", "1722", "4616", "4617"
        entries = [row for row in entries if text_of(dict_of(row).get("image_id")) not in corrupted]
    must(len(entries) == len(split))
    # For each image, its rows of boxes and of relations. None for an image that is refused.
    rows: list[dict[str, range] | None] = [{} if value in (0, 1, 2) else None for value in split]
    for what, length in (("box", len(labels)), ("rel", len(numbers))):
        ranges = [_rows(*ends, length) for ends in zip(arrays["first", what], arrays["last", what])]
        rows = [None if own is None or part is None else own | {what: part} for own, part in zip(rows, ranges)]
        order = sorted((own[what].start, image) for image, own in enumerate(rows) if own and own[what])
        seen = -1
        for start, image in order:
            part = rows[image][what]  # type: ignore[index]
            if start <= seen:
                rows[image] = None
            seen = max(seen, part.stop - 1)
    files: dict[int, tuple] = {}
    for image, row in enumerate(entries):
        entry = _entry(row)
        if entry is None or entry[0] in [file[0] for file in files.values()]:
            rows[image] = None
        else:
            files[image] = entry
    expected.lose("refused", "image", sum(own is None for own in rows))
    kept = [image for image, own in enumerate(rows) if own is not None]
    if 1 in split:
        must(options.wanted is None and options.choice == "hash")
    elif options.split != "test":
        training = [image for image in kept if split[image] == 0 and rows[image]["rel"]]  # type: ignore[index]
        for image, mark in zip(training, held_out([files[i][0] for i in training], options, 5000)):
            split[image] = int(mark)
    for what, noun, count in (("box", "object", len(labels)), ("rel", "relation", len(numbers))):
        expected.lose("left out", noun, count - sum(len(rows[image][what]) for image in kept))  # type: ignore[index]
    for image in kept:
        if SPLITS[split[image]] == options.split:
            _graph(expected, options, files[image], rows[image], arrays, side)  # type: ignore[arg-type]
    return expected


def _classes(root: Path) -> tuple[list[str], list[str]]:
    paths = [root / name for name in ("VG-SGG-dicts-with-attri.json", "VG-SGG-dicts.json")]
    path = next((path for path in paths if path.exists()), None) or only(root.glob("*dicts*.json"))
    must(path)
    dicts = json_of(path, dict)  # type: ignore[arg-type]
    found = []
    for what in ("label", "predicate"):
        one, other = dicts.get(f"idx_to_{what}"), dicts.get(f"{what}_to_idx")
        forms = [Classes(one.items())] if isinstance(one, dict) else []
        forms += [Classes((key, name) for name, key in other.items())] if isinstance(other, dict) else []
        must(forms and all(form.names == forms[0].names and form.numbers == forms[0].numbers for form in forms))
        must(all(key == str(number) for key, number in forms[0].numbers.items()))
        found.append(forms[0].names)
    return found[0], found[1]


def _arrays(path: Path) -> tuple[dict[Any, list], int]:
    """Return the arrays as lists of numbers, with None for a number that is not whole, and the unit of the boxes."""
    ranges = [(end, what) for end in ("first", "last") for what in ("box", "rel")]
    try:
        with h5py.File(path, "r") as file:
            side = 1024 if "boxes_1024" in file else 512
            names = ["labels", "predicates", "split", "relationships", f"boxes_{side}"]
            loaded = {name: file[name][()] for name in [*names, *(f"img_to_{end}_{what}" for end, what in ranges)]}
    except Exception:  # h5py raises errors of many types for damaged files
        raise Malformed from None
    must(all(isinstance(array, np.ndarray) and array.dtype.kind in "iuf" for array in loaded.values()))
    for name in names[:3]:
        must(loaded[name].ndim == 1 or loaded[name].shape[1:] == (1,))
    for name, width, count in ((names[3], 2, len(loaded["predicates"])), (names[4], 4, len(loaded["labels"]))):
        must(loaded[name].shape == (count, width) or count == loaded[name].size == 0)
    arrays: dict[Any, list] = {name: [_whole(v) for v in loaded[name].reshape(-1).tolist()] for name in names[:3]}
    arrays["pairs"] = [[_whole(v) for v in row] for row in loaded[names[3]].reshape(-1, 2).tolist()]
    boxes = loaded[names[4]].reshape(-1, 4)
    is_float = boxes.dtype.kind == "f"
    arrays["boxes"] = [row if is_float else [_whole(v) for v in row] for row in boxes.tolist()]
    for end, what in ranges:
        arrays[end, what] = [_whole(v) for v in loaded[f"img_to_{end}_{what}"].reshape(-1).tolist()]
        must(len(arrays[end, what]) == len(arrays["split"]))
    return arrays, side


def _whole(value: float) -> int | None:
    is_whole = abs(value) < 2**62 and value == math.floor(value)  # also false for NaN
    return int(value) if is_whole else None


def _rows(first: int | None, last: int | None, length: int) -> range | None:
    """Return the rows of an image, which may be none, or None if they are impossible."""
    if first is None or last is None:
        return None
    if last == first - 1 or first == last == -1:
        return range(0)
    return range(first, last + 1) if 0 <= first <= last < length else None


def _entry(row: Any) -> tuple[str, int, int] | None:
    row = dict_of(row)
    size, key, file = size_of(row.get("width"), row.get("height")), row.get("image_id"), row.get("file_name")
    name = file if key is None else text_of(key)
    if size is None or not name or not (file is None or is_path(file)):
        return None
    name = name if PurePosixPath(name).suffix.lower() in (".jpg", ".png") else f"{name}.jpg"
    return (name, *size) if is_path(name) else None


def _graph(
    expected: Expected, options: Options, entry: tuple, rows: dict[str, range], arrays: dict[Any, list], side: int
) -> None:
    name, *size = entry
    everything, training = options.keep == "everything", options.split == "train"
    used = everything or bool(rows["rel"]) or (options.keep == "objects" and bool(rows["box"]))
    if not used:
        expected.lose("left out", "image")
    places: dict[int, int] = {}
    boxes, labels, relations = [], [], []
    for row in rows["box"]:
        label, box = arrays["labels"][row], arrays["boxes"][row]
        valid = all(v is not None and abs(v) <= LARGEST for v in box) and box[2] > 0 and box[3] > 0
        if label is None or not 1 <= label < len(expected.objects) or not valid:
            expected.lose("refused", "object")
        elif used:
            low = [center - extent / 2 for center, extent in zip(box[:2], box[2:])]
            low = [math.trunc(v) if isinstance(box[0], int) else v for v in low]
            unit = max(size) / side
            corner = [v * unit for v in (*low, low[0] + box[2], low[1] + box[3])]
            if training and not everything:
                corner = [min(max(v, 0), end - 1) for v, end in zip(corner, (*size, *size))]
            if corner[0] < corner[2] and corner[1] < corner[3]:
                places[row] = len(boxes)
                boxes.append([single(v) for v in corner])
                labels.append(label)
            else:
                expected.lose("left out", "object")
    for row in rows["rel"]:
        pair, number = arrays["pairs"][row], arrays["predicates"][row]
        if number is None or not 1 <= number < len(expected.predicates) or not all(end in rows["box"] for end in pair):
            expected.lose("refused", "relation")
        elif all(end in places for end in pair):
            relations.append([*(places[end] for end in pair), number])
        elif used:
            expected.lose("left out", "relation")
    if used and training and options.keep == "related" and not relations:
        expected.lose("left out", "image")
    elif used:
        expected.graphs.append((name, *size, boxes, labels, relations))  # type: ignore[arg-type]
