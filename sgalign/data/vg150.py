"""VG150 (Visual Genome with 150 object and 50 predicate classes; Xu et al., CVPR 2017) and data in its layout."""

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
from sgalign.data.scene_graph import BACKGROUND, SPLITS, SceneGraph, check_split, count_validation_images
from sgalign.data.triplets import zero_shot_triplets
from sgalign.errors import InputError
from sgalign.files import hdf5_written_whole, read_json, read_tensors, write_json

CORRUPTED = {1592, 1722, 4616, 4617}  # ids in image_data.json that the official HDF5 file lacks
IMAGE_FOLDERS = ("VG_100K", "images")
REMEDY = "download or write it again"


class VG150Dataset(Dataset[SceneGraph]):
    """Scene graphs of Visual Genome with 150 object and 50 predicate classes, or of other files in the same layout.

    The files are `VG-SGG.h5` or `VG-SGG-with-attri.h5`, `VG-SGG-dicts*.json` and `image_data.json`. The rules follow
    Scene-Graph-Benchmark, with the differences that are named:

    - Images without objects or without relations are left out.
    - Boxes come from `boxes_1024`, or from `boxes_512` if the file lacks it. They are centers and extents, for an image
      scaled to a long side of 1024 or 512. They are converted to corners in the dtype of the file, so integers truncate
      halves.
    - In the training split, relations between boxes that do not overlap are left out. Then boxes are clipped to the
      image, and empty boxes are left out with their relations. Then images without remaining relations are left out.
      Scene-Graph-Benchmark counts boxes that touch as overlapping, and it also clips validation and test boxes.
    - If a pair has several predicates, all of them are kept. Scene-Graph-Benchmark draws one of them.
    - Attributes are not read.

    Files other than the official ones work too. They may have any number of classes and images, floating-point boxes,
    and their own validation split (1). Annotations stay in memory (30 MB for the official files). Images are read on
    demand.

    Args:
        root: folder of these files. Images are optional. Their paths are `VG_100K/ID.jpg` or `images/ID.jpg`.
        split: "train" (0 in the file), "validation" (1) or "test" (2).
        validation_images: number of images from the start of the training split that form the validation split. If
            None, 5000, but at most a fifth of the training images. It must be None if the file has a validation split.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the array and the row.
    """

    def __init__(
        self, root: str | Path, split: Literal["train", "validation", "test"], *, validation_images: int | None = None
    ) -> None:
        check_split(split)
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
            raise InputError(f"{self.path}: has its own validation split, so validation_images must be left out")
        if len(parts[1]) == 0 and split != "test":
            count = count_validation_images(validation_images, len(parts[0]), 5000, self.path)
            parts[1], parts[0] = parts[0][:count], parts[0][count:]
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
        """Return the boxes in pixels, labels and relations of the image in row `image` of the file."""
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
        """Return the id, width and height of each image of the HDF5 file."""
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
    """Return the class triplets that never occur in training.

    Args:
        path: a CSV file, with or without a header line, or the public benchmark's `zeroshot_triplet.pytorch`.

    Returns:
        Subject class, object class and predicate, all from 1, int64 `[Z, 3]`. The evaluators expect another order
        (subject class, predicate, object class), so reorder the columns with `triplets[:, [0, 2, 1]]`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has neither of the two formats.
    """
    path, what = Path(path), "file of zero-shot triplets"
    if path.suffix == ".csv":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such {what}")
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = [row for row in csv.reader(file) if row]
            triplets = torch.tensor([[int(v) for v in row] for row in rows[0 if rows[0][0].isdigit() else 1 :]])
        except (IndexError, ValueError) as error:
            raise InputError(f"{path}: must be a {what}, but is not one or is cut short ({error}); {REMEDY}") from error
    else:
        triplets = read_tensors(path, what)
    if not isinstance(triplets, Tensor) or triplets.dim() != 2 or triplets.shape[1] != 3 or (triplets < 1).any():
        raise InputError(
            f"{path}: every row must be a subject class, an object class and a predicate, all from 1; {REMEDY}"
        )
    return triplets.long()


def _read_arrays(path: Path, objects: int, predicates: int) -> dict[str, Any]:
    """Return the checked arrays of the file by name.

    `boxes` contains corners. `long_side` is the length of an image's long side in the unit of the boxes.
    """
    arrays, boxes, long_side = _load_arrays(path)
    try:
        _check_rows(arrays, boxes, f"boxes_{long_side}", objects, predicates)
        _check_images(arrays, {"box": len(arrays["labels"]), "rel": len(arrays["predicates"])})
        _check_pairs(arrays)
    except InputError as error:
        raise InputError(f"{path}, {error}; {REMEDY}") from None
    corners = boxes.copy()
    # The array keeps the file's dtype, so integers truncate halves, as in the public code.
    corners[:, :2] = boxes[:, :2] - boxes[:, 2:] / 2
    corners[:, 2:] = corners[:, :2] + boxes[:, 2:]
    return arrays | {"boxes": corners, "long_side": long_side}


def _load_arrays(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Return the arrays of the file, its boxes, and the length of an image's long side in the unit of the boxes."""
    wanted = {"labels", "relationships", "predicates", "split"}
    wanted |= {f"img_to_{end}_{what}" for end in ("first", "last") for what in ("box", "rel")}
    try:
        with h5py.File(path, "r") as file:
            if missing := sorted(wanted - set(file)):
                raise InputError(f"{path}: must have the arrays {', '.join(missing)}; {REMEDY}")
            sides = [side for side in (1024, 512) if f"boxes_{side}" in file]
            if not sides:
                raise InputError(f"{path}: must have the array boxes_1024 or boxes_512; {REMEDY}")
            return {name: file[name][()] for name in wanted}, file[f"boxes_{sides[0]}"][()], sides[0]
    except (OSError, TypeError) as error:  # TypeError if a group is in an array's place
        raise InputError(f"{path}: must be an HDF5 file, but is not one or is cut short ({error}); {REMEDY}") from error


def _check_rows(
    arrays: dict[str, np.ndarray], boxes: np.ndarray, boxes_name: str, objects: int, predicates: int
) -> None:
    """Check the arrays with one row per box, relation or image, and flatten those with one column."""
    for name, array in (*arrays.items(), (boxes_name, boxes)):
        if not (isinstance(array, np.ndarray) and array.dtype.kind in "iuf" and np.isfinite(array).all()):
            kind = getattr(array, "dtype", type(array).__name__)
            raise InputError(f"array {name}: must be numeric and finite, got {kind}")
    for name in ("labels", "predicates", "split"):  # [N, 1] in the official file
        arrays[name] = arrays[name].reshape(-1)
    count, relations = len(arrays["labels"]), len(arrays["predicates"])
    if boxes.shape != (count, 4):
        raise InputError(f"array {boxes_name}: must be [{count}, 4] to match labels, got {list(boxes.shape)}")
    if arrays["relationships"].shape != (relations, 2):
        raise InputError(f"array relationships: must be [{relations}, 2], got {list(arrays['relationships'].shape)}")
    for name, low, high in (("labels", 1, objects), ("predicates", 1, predicates), ("split", 0, 2)):
        values = arrays[name]
        if (wrong := np.flatnonzero((values < low) | (values > high))).size:
            raise InputError(f"array {name}: must be from {low} to {high}, got {values[wrong[0]]} in row {wrong[0]}")
    if (wrong := np.flatnonzero(~((boxes[:, 2:] > 0).all(1) & np.isfinite(boxes).all(1)))).size:
        raise InputError(
            f"array {boxes_name}: boxes must have a width and a height above 0, got "
            f"{boxes[wrong[0]].tolist()} in row {wrong[0]}"
        )


def _check_images(arrays: dict[str, np.ndarray], lengths: dict[str, int]) -> None:
    """Check the first and last row of each image's boxes and relations, and make them int64."""
    images = len(arrays["split"])
    for what, length in lengths.items():
        names = f"img_to_first_{what}", f"img_to_last_{what}"
        first, last = (arrays[name].astype(np.int64).reshape(-1) for name in names)
        if len(first) != images or len(last) != images:
            raise InputError(f"arrays {' and '.join(names)}: must have {images} rows to match split")
        none = (first == -1) & (last == -1)
        if (wrong := np.flatnonzero(~none & ((first < 0) | (last < first) | (last >= length)))).size:
            got = f"{first[wrong[0]]} and {last[wrong[0]]} in row {wrong[0]}"
            raise InputError(
                f"arrays {', '.join(names)}: must be ascending and from 0 to {length - 1}, or both -1, got {got}"
            )
        arrays |= zip(names, (first, last))


def _check_pairs(arrays: dict[str, np.ndarray]) -> None:
    """Check that each relation joins two boxes of its image, and make the pairs int64."""
    pairs = arrays["relationships"] = arrays["relationships"].astype(np.int64)
    for image in np.flatnonzero(arrays["img_to_first_rel"] >= 0):
        rows = slice(arrays["img_to_first_rel"][image], arrays["img_to_last_rel"][image] + 1)
        inside = (pairs[rows] >= arrays["img_to_first_box"][image]) & (pairs[rows] <= arrays["img_to_last_box"][image])
        if not inside.all():
            row = rows.start + int(np.flatnonzero(~inside.all(1))[0])
            got = f"{pairs[row].tolist()} in row {row}"
            raise InputError(f"array relationships: must refer to boxes of the image in row {image}, got {got}")


def _names(dicts: Any, field: str, root: Path) -> list[str]:
    names = dicts.get(field) if isinstance(dicts, dict) else None
    if not isinstance(names, dict) or not names or set(names) != {str(i + 1) for i in range(len(names))}:
        raise InputError(f"{root}, *dicts*.json: {field} must map '1', '2', ... to names; {REMEDY}")
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
    """Write scene graphs in the layout of VG150's official files, with their own validation split (1)."""
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
    write_json(root / "VG-SGG-dicts.json", _dictionaries(object_names, predicate_names, labels, predicates))
    write_json(root / "image_data.json", rows)
    _write_zero_shot_triplets(parts, root / "zeroshot_triplets.csv")


def _dictionaries(
    object_names: list[str], predicate_names: list[str], labels: list[int], predicates: list[int]
) -> dict[str, Any]:
    """Return the content of VG-SGG-dicts.json: names by number from 1, numbers by name, and the count of each name."""
    dicts: dict[str, Any] = {}
    for what, counted, names, found in (
        ("label", "object", object_names, Counter(labels)),
        ("predicate", "predicate", predicate_names, Counter(predicates)),
    ):
        dicts[f"idx_to_{what}"] = {str(i): name for i, name in enumerate(names) if i}
        dicts[f"{what}_to_idx"] = {name: i for i, name in enumerate(names) if i}
        dicts[f"{counted}_count"] = {name: found[i] for i, name in enumerate(names) if i}
    return dicts


def _write_zero_shot_triplets(parts: Mapping[str, Sequence[SceneGraph]], path: Path) -> None:
    """Write the class triplets that occur only in test images, as rows of subject class, object class and predicate."""
    seen = [graph for split in ("train", "validation") for graph in parts.get(split, [])]
    unseen = zero_shot_triplets(seen, parts.get("test", []))[:, [0, 2, 1]].tolist()
    lines = ["subject,object,predicate", *(",".join(map(str, triplet)) for triplet in sorted(unseen))]
    path.write_text("\n".join(lines) + "\n")
