"""Visual Genome with 150 object and 50 predicate classes (Xu et al., CVPR 2017), and files in its layout."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sgalign.data.images import load_image, save_image
from sgalign.data.scene_graph import BACKGROUND, SPLITS, SceneGraph
from sgalign.data.triplets import zero_shot_triplets
from sgalign.errors import InputError
from sgalign.files import hdf5_written_whole, read_json, read_tensors, write_json

CORRUPTED = {1592, 1722, 4616, 4617}  # in image_data.json, but not in the official HDF5 file
IMAGE_FOLDERS = ("VG_100K", "images")
REMEDY = "download or write it again"


class VG150Dataset(Dataset[SceneGraph]):
    """Scene graphs of `VG-SGG.h5` or `VG-SGG-with-attri.h5`, `VG-SGG-dicts*.json` and `image_data.json`.

    Read as Scene-Graph-Benchmark does: images need objects and relations; boxes are `boxes_1024` (else `boxes_512`),
    middle and extent in the units of a long side of 1024, turned into corners in the file's own integers, whose halves
    are cut off. Training images lose what lies outside of them, relations of boxes that do not overlap, and then images
    without any relation. Several predicates of a pair are kept, of which that code draws one. Attributes are not read.

    Nothing depends on the numbers of the official files: others may have any classes and images, float boxes, and a
    validation part of their own (split 1). Annotations are kept in memory (30 MB for the official ones), images are
    read when asked for.

    Args:
        root: folder of these files, and of the images as `VG_100K/ID.jpg` or `images/ID.jpg`, if wanted.
        split: "train" (0 in the file), "validation" or "test" (2).
        validation_images: how many of the training images, from the first on, are the validation part, where the file
            has none; None for 5000, at most a fifth.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what it should be; names file, array and row.
    """

    def __init__(
        self, root: str | Path, split: Literal["train", "validation", "test"], *, validation_images: int | None = None
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        self.root, self.split = Path(root), split
        self.path = _only(self.root, "VG-SGG-with-attri.h5", "VG-SGG.h5", "*.h5")
        names = read_json(_only(self.root, "VG-SGG-dicts-with-attri.json", "VG-SGG-dicts.json", "*dicts*.json"))
        self.object_names = _names(names, "idx_to_label", self.root)
        self.predicate_names = _names(names, "idx_to_predicate", self.root)
        self._arrays = _read_arrays(self.path, len(self.object_names) - 1, len(self.predicate_names) - 1)
        self._sizes = self._read_sizes(len(self._arrays["split"]))
        found = [self.root / folder for folder in IMAGE_FOLDERS if (self.root / folder).is_dir()]
        self._folder = found[0] if found else None

        used = (self._arrays["img_to_first_box"] >= 0) & (self._arrays["img_to_first_rel"] >= 0)
        parts = {number: np.flatnonzero(used & (self._arrays["split"] == number)) for number in (0, 1, 2)}
        if len(parts[1]) and validation_images is not None:
            raise InputError(f"{self.path}: has a validation part of its own, validation_images must be left out")
        if len(parts[1]) == 0 and split != "test":
            if validation_images is None:
                validation_images = min(5000, len(parts[0]) // 5)
            if not 0 <= validation_images <= len(parts[0]):
                raise InputError(
                    f"validation_images must be in 0 to {len(parts[0])}, what {self.path} has, got {validation_images}"
                )
            parts[1], parts[0] = parts[0][:validation_images], parts[0][validation_images:]
        images = parts[SPLITS.index(split)]
        if split == "train":
            images = np.array([image for image in images.tolist() if len(self._graph(image)[2])], dtype=np.int64)
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SceneGraph:
        image = int(self._images[index])
        image_id, width, height = self._sizes[image]
        boxes, labels, relations = self._graph(image)
        path = None if self._folder is None else self._folder / f"{image_id}.jpg"
        load = None if path is None else partial(load_image, path)
        return SceneGraph(f"{image_id}.jpg", width, height, boxes, labels, relations, load)

    def _graph(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes in pixels, labels and relations of an image of the file."""
        arrays, (_, width, height) = self._arrays, self._sizes[image]
        first, last = arrays["img_to_first_box"][image], arrays["img_to_last_box"][image]
        corners, labels = arrays["boxes"][first : last + 1], arrays["labels"][first : last + 1]
        rows = slice(arrays["img_to_first_rel"][image], arrays["img_to_last_rel"][image] + 1)
        pairs, predicates = arrays["relationships"][rows] - first, arrays["predicates"][rows]
        if self.split == "train":
            low = np.maximum(corners[pairs[:, 0], :2], corners[pairs[:, 1], :2])
            high = np.minimum(corners[pairs[:, 0], 2:], corners[pairs[:, 1], 2:])
            overlap = (high > low).all(1)
            pairs, predicates = pairs[overlap], predicates[overlap]
        boxes = corners / arrays["long_side"] * max(width, height)
        if self.split == "train":
            boxes = boxes.clip(0, [width - 1, height - 1] * 2)
            kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
            place = np.cumsum(kept) - 1
            there = kept[pairs].all(1)
            boxes, labels, pairs, predicates = boxes[kept], labels[kept], place[pairs[there]], predicates[there]
        return (
            torch.from_numpy(boxes.astype(np.float32)),
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(np.column_stack([pairs, predicates]).astype(np.int64).reshape(-1, 3)),
        )

    def _read_sizes(self, count: int) -> list[tuple[int, int, int]]:
        """Id, width and height of each image of the HDF5 file."""
        path = self.root / "image_data.json"
        rows = read_json(path)
        if not isinstance(rows, list):
            raise InputError(f"{path}: must be a list of images, got {type(rows).__name__}; {REMEDY}")
        for number, row in enumerate(rows):
            fields = [row.get(field) if isinstance(row, dict) else None for field in ("image_id", "width", "height")]
            if not all(type(value) is int and value > 0 for value in fields):
                raise InputError(f"{path}, row {number}: must have image_id, width and height, got {row!r}; {REMEDY}")
        if len(rows) == count + len(CORRUPTED):
            rows = [row for row in rows if row["image_id"] not in CORRUPTED]
        if len(rows) != count:
            raise InputError(f"{path}: must have the {count} images of {self.path}, got {len(rows)}; {REMEDY}")
        return [(row["image_id"], row["width"], row["height"]) for row in rows]


def read_zero_shot_triplets(path: str | Path) -> Tensor:
    """The triplets that never occur in training: int64 `[Z, 3]`, subject, object and predicate class, from 1.

    Args:
        path: a CSV file, with or without a line of names, or the public benchmark's `zeroshot_triplet.pytorch`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not one of these.
    """
    path, what = Path(path), "file of zero-shot triplets"
    if path.suffix == ".csv":
        if not path.is_file():
            raise FileNotFoundError(f"no {what} {path}")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [row for row in csv.reader(file) if row]
            triplets = torch.tensor([[int(v) for v in row] for row in rows[0 if rows[0][0].isdigit() else 1 :]])
        except (IndexError, ValueError) as error:
            raise InputError(f"{path}: not a {what}, or cut short ({error}); {REMEDY}") from error
    else:
        triplets = read_tensors(path, what)
    if not isinstance(triplets, Tensor) or triplets.dim() != 2 or triplets.shape[1] != 3 or (triplets < 1).any():
        raise InputError(f"{path}: must be rows of subject, object and predicate class from 1; {REMEDY}")
    return triplets.long()


def _read_arrays(path: Path, objects: int, predicates: int) -> dict[str, Any]:
    """The arrays of the file, boxes as corners; checked."""

    def fail(message: str) -> InputError:
        return InputError(f"{path}, {message}; {REMEDY}")

    wanted = {"labels", "relationships", "predicates", "split"}
    wanted |= {f"img_to_{end}_{what}" for end in ("first", "last") for what in ("box", "rel")}
    try:
        with h5py.File(path, "r") as file:
            if missing := sorted(wanted - set(file)):
                raise fail(f"arrays {', '.join(missing)}: must be there")
            sides = [side for side in (1024, 512) if f"boxes_{side}" in file]
            if not sides:
                raise fail("arrays boxes_1024 or boxes_512: one must be there")
            arrays: dict[str, Any] = {name: file[name][()] for name in wanted}
            boxes = file[f"boxes_{sides[0]}"][()]
    except (OSError, TypeError) as error:  # TypeError of a group in an array's place
        raise InputError(f"{path}: not an HDF5 file, or cut short ({error}); {REMEDY}") from error
    for name, array in (*arrays.items(), (f"boxes_{sides[0]}", boxes)):
        if not (isinstance(array, np.ndarray) and array.dtype.kind in "iuf" and np.isfinite(array).all()):
            raise fail(f"array {name}: must be of finite numbers, got {getattr(array, 'dtype', type(array).__name__)}")
    for name in ("labels", "predicates", "split"):  # [N, 1] in the official file
        arrays[name] = arrays[name].reshape(-1)
    count, images, relations = len(arrays["labels"]), len(arrays["split"]), len(arrays["predicates"])
    if boxes.shape != (count, 4):
        raise fail(f"array boxes_{sides[0]}: must be [{count}, 4] as labels are, got {list(boxes.shape)}")
    if arrays["relationships"].shape != (relations, 2):
        raise fail(f"array relationships: must be [{relations}, 2], got {list(arrays['relationships'].shape)}")
    for name, values, low, high in (
        ("labels", arrays["labels"], 1, objects),
        ("predicates", arrays["predicates"], 1, predicates),
        ("split", arrays["split"], 0, 2),
    ):
        if (wrong := np.flatnonzero((values < low) | (values > high))).size:
            raise fail(f"array {name}: must be in {low} to {high}, got {values[wrong[0]]} in row {wrong[0]}")
    if (wrong := np.flatnonzero(~((boxes[:, 2:] > 0).all(1) & np.isfinite(boxes).all(1)))).size:
        raise fail(f"array boxes_{sides[0]}: must have an extent, got {boxes[wrong[0]].tolist()} in row {wrong[0]}")
    for what, length in (("box", count), ("rel", relations)):
        first, last = (arrays[f"img_to_{end}_{what}"].astype(np.int64).reshape(-1) for end in ("first", "last"))
        if len(first) != images or len(last) != images:
            raise fail(f"arrays img_to_first_{what} and img_to_last_{what}: must have {images} rows as split has")
        none = (first == -1) & (last == -1)
        if (wrong := np.flatnonzero(~none & ((first < 0) | (last < first) | (last >= length)))).size:
            row = wrong[0]
            raise fail(f"arrays img_to_first_{what}, img_to_last_{what}: must be in 0 to {length - 1}, "
                       f"got {first[row]} and {last[row]} in row {row}")  # fmt: skip
        arrays[f"img_to_first_{what}"], arrays[f"img_to_last_{what}"] = first, last
    pairs = arrays["relationships"] = arrays["relationships"].astype(np.int64)
    for image in np.flatnonzero(arrays["img_to_first_rel"] >= 0):
        rows = slice(arrays["img_to_first_rel"][image], arrays["img_to_last_rel"][image] + 1)
        inside = (pairs[rows] >= arrays["img_to_first_box"][image]) & (pairs[rows] <= arrays["img_to_last_box"][image])
        if not inside.all():
            row = rows.start + int(np.flatnonzero(~inside.all(1))[0])
            raise fail(
                f"array relationships: must be of boxes of image {image}, got {pairs[row].tolist()} in row {row}"
            )
    corners = boxes.copy()
    # Into an integer array, as the public code does: halves are cut off.
    corners[:, :2] = boxes[:, :2] - boxes[:, 2:] / 2
    corners[:, 2:] = corners[:, :2] + boxes[:, 2:]
    return arrays | {"boxes": corners, "long_side": sides[0]}


def _names(dicts: Any, field: str, root: Path) -> list[str]:
    names = dicts.get(field) if isinstance(dicts, dict) else None
    if not isinstance(names, dict) or not names or set(names) != {str(i + 1) for i in range(len(names))}:
        raise InputError(f"{root}, dicts: {field} must be names by '1', '2', ...; {REMEDY}")
    return [BACKGROUND, *(str(names[str(i + 1)]) for i in range(len(names)))]


def _only(root: Path, *patterns: str) -> Path:
    for pattern in patterns:
        if found := sorted(root.glob(pattern)):
            return found[0]
    raise FileNotFoundError(f"{root}: must have {' or '.join(patterns)}")


LONG_SIDE = 1024


def write_vg150(
    parts: Mapping[str, Sequence[SceneGraph]],
    object_names: list[str],
    predicate_names: list[str],
    root: Path,
    *,
    images: bool = False,
) -> None:
    """The layout of VG150's official files, with a validation part of its own (split 1)."""
    root.mkdir(parents=True)
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    pairs: list[list[int]] = []
    predicates: list[int] = []
    columns: dict[str, list[int]] = {f"img_to_{e}_{w}": [] for e in ("first", "last") for w in ("box", "rel")}
    rows: list[dict[str, int]] = []
    splits: list[int] = []
    for number, split in enumerate(SPLITS):
        for graph in parts.get(split, []):
            image_id = len(rows) + 1
            rows.append({"image_id": image_id, "width": graph.width, "height": graph.height})
            splits.append(number)
            if images:
                save_image(graph, root / "VG_100K" / f"{image_id}.jpg")
            for what, start, count in (
                ("box", len(labels), len(graph.labels)),
                ("rel", len(predicates), len(graph.relations)),
            ):
                columns[f"img_to_first_{what}"].append(start if count else -1)
                columns[f"img_to_last_{what}"].append(start + count - 1 if count else -1)
            start = len(labels)
            corners = np.floor(graph.boxes.numpy() * LONG_SIDE / max(graph.width, graph.height))
            extent = np.maximum(corners[:, 2:] - corners[:, :2], 1)
            boxes.append(np.concatenate([corners[:, :2] + np.floor(extent / 2), extent], 1).astype(np.int32))
            labels += graph.labels.tolist()
            for subject, object_, predicate in graph.relations.tolist():
                pairs.append([start + subject, start + object_])
                predicates.append(predicate)
    with hdf5_written_whole(root / "VG-SGG.h5") as file:
        all_boxes = np.concatenate(boxes) if boxes else np.zeros((0, 4), np.int32)
        file["boxes_1024"], file["boxes_512"] = all_boxes, np.maximum(all_boxes // 2, [0, 0, 1, 1]).astype(np.int32)
        file["labels"] = np.array(labels, np.int64).reshape(-1, 1)
        file["relationships"] = np.array(pairs, np.int32).reshape(-1, 2)
        file["predicates"] = np.array(predicates, np.int64).reshape(-1, 1)
        file["split"] = np.array(splits, np.int32)
        for name, column in columns.items():
            file[name] = np.array(column, np.int32)
    counts = Counter(labels), Counter(predicates)
    dicts: dict[str, Any] = {}
    for what, names, found in zip(("label", "predicate"), (object_names, predicate_names), counts):
        dicts[f"idx_to_{what}"] = {str(i): name for i, name in enumerate(names) if i}
        dicts[f"{what}_to_idx"] = {name: i for i, name in enumerate(names) if i}
        of = "object" if what == "label" else what
        dicts[f"{of}_count"] = {name: found[i] for i, name in enumerate(names) if i}
    write_json(root / "VG-SGG-dicts.json", dicts)
    write_json(root / "image_data.json", rows)
    seen = [graph for split in ("train", "validation") for graph in parts.get(split, [])]
    unseen = zero_shot_triplets(seen, parts.get("test", []))[:, [0, 2, 1]].tolist()
    lines = ["subject,object,predicate", *(",".join(map(str, triplet)) for triplet in sorted(unseen))]
    (root / "zeroshot_triplets.csv").write_text("\n".join(lines) + "\n")
