"""VG150 (Visual Genome with 150 object and 50 predicate classes; Xu et al., CVPR 2017) and data in its layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from sgalign.data.box_checks import are_beyond, likely_causes
from sgalign.data.class_names import id_text
from sgalign.data.findings import EXAMPLES, BadRows, Findings
from sgalign.data.image_files import ImageFiles
from sgalign.data.images import Size, check_file_name, image_suffixes, load_image, parse_size, save_image
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.data.splits import SPLITS, Split, ValidationChoice, check_has_no_validation, check_split, held_out
from sgalign.data.triplets import zero_shot_triplets
from sgalign.data.vg150_arrays import REMEDY, only, read_arrays, read_names
from sgalign.errors import InputError, shown
from sgalign.files import hdf5_written_whole, read_json, write_json

CORRUPTED = {"1592", "1722", "4616", "4617"}  # ids in image_data.json that the official HDF5 file lacks
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "images")

Keep = Literal["related", "objects", "everything"]
KEEP = get_args(Keep)


class _Entry(NamedTuple):
    """A row of image_data.json."""

    name: str  # id of the image in this package
    file_name: str
    size: Size


class VG150Dataset(SceneGraphDataset):
    """Scene graphs of Visual Genome with 150 object and 50 predicate classes, or of other files in the same layout.

    The files are `VG-SGG.h5` or `VG-SGG-with-attri.h5`, `VG-SGG-dicts*.json` and `image_data.json`. The rules follow
    Scene-Graph-Benchmark, with the differences that are named:

    - Images without objects or without relations are left out.
    - Boxes come from `boxes_1024`, or from `boxes_512` if the file lacks it. They are centers and extents, for an image
      scaled to a long side of 1024 or 512. They are converted to corners, and integers truncate halves.
    - In the training split, boxes are clipped to the image, and empty boxes are left out with their relations. Then
      images without remaining relations are left out. Scene-Graph-Benchmark also clips validation and test boxes.
    - If a pair has several predicates, all of them are kept. Scene-Graph-Benchmark draws one of them.
    - Attributes are not read.

    Relations between boxes that do not overlap are kept. For SGDet, `sgalign.training.SceneGraphData` leaves them out
    of training, as Scene-Graph-Benchmark does.

    Files other than the official ones work too. They may have any number of classes and images, numbers of any type,
    and their own validation split (1). Annotations stay in memory (30 MB for the official files). Images are read on
    demand.

    Args:
        root: folder of these files. Images are optional. They are called `ID.jpg`, or have another suffix, and lie in
            `VG_100K/`, `VG_100K_2/` or `images/`. If a row of `image_data.json` has no `image_id`, its `file_name` is
            the image's name.
        split: "train" (0 in the file), "validation" (1) or "test" (2).
        validation_images: number of training images that form the validation split. If None, 5000, but at most a fifth
            of the training images. It must be None if the file has a validation split.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`. Scene-Graph-Benchmark takes the first
            5000 images of the training split.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.
        keep: "related" for the rules above. "objects" also keeps images without relations, on which detectors train.
            "everything" keeps all images, and all boxes as the file has them.

    Attributes:
        object_names, predicate_names: class names, `__background__` first.
        findings: the rows that were left out or clipped, and oddities. They are also logged.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is malformed. The error names the file, the array and the row.
    """

    annotation_files = ("*.h5", "*dicts*.json", "image_data.json")

    def __init__(
        self,
        root: str | Path,
        split: Split,
        *,
        validation_images: int | None = None,
        validation_choice: ValidationChoice = "hash",
        bad_rows: BadRows = "error",
        keep: Keep = "related",
    ) -> None:
        check_split(split)
        if keep not in KEEP:
            raise InputError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
        self.root, self.split, self._keep = Path(root), split, keep
        self.path = only(self.root, "VG-SGG-with-attri.h5", "VG-SGG.h5", "*.h5")
        objects, predicates = read_names(self.root)
        self.object_names, self.predicate_names = objects.names, predicates.names
        self.findings = Findings(f"{self.path}, {split}")
        self._arrays = read_arrays(self.path)
        self._refused = self._arrays.refused_images(self.findings)
        self._entries = self._read_entries(len(self._arrays.split))
        self._files = ImageFiles([*(self.root / folder for folder in IMAGE_FOLDERS), self.root])
        of_split = self._of_split(validation_images, validation_choice)
        self._mark_refused_rows(of_split)
        self._images = self._used(self._place(self._chosen(of_split)))
        self._count_missing()
        self.findings.raise_or_log(bad_rows)

    @staticmethod
    def splits_in(root: Path) -> list[Split]:
        return list(SPLITS) if any(root.glob("*.h5")) else []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> SceneGraph:
        image = int(self._images[index])
        name, file_name, size = self._entries[image]
        first = self._arrays.first["box"][image]
        rows, _ = self._arrays.rows("box", np.array([image]))
        kept = self._box_kept[rows]
        place = np.cumsum(kept) - 1
        relations, _ = self._arrays.rows("rel", np.array([image]))
        relations = relations[self._relation_kept[relations]]
        pairs = place[self._arrays.pairs[relations] - first].reshape(-1, 2)
        path = self._files.find(file_name)
        return SceneGraph(
            name,
            *size,
            torch.from_numpy(self._boxes[rows[kept]].astype(np.float32)),
            torch.from_numpy(self._arrays.labels[rows[kept]]),
            torch.from_numpy(np.column_stack([pairs, self._arrays.predicates[relations]])),
            None if path is None else partial(load_image, path, size),
        )

    def _of_split(self, validation_images: int | None, validation_choice: ValidationChoice) -> np.ndarray:
        """Return the images of the split, in the order of the file."""
        split = self._arrays.split
        if (split == 1).any():
            check_has_no_validation(self.path, validation_images, validation_choice)
        elif self.split != "test":
            # Only images with relations are held out, so the choice does not depend on `keep`.
            training = np.flatnonzero(~self._refused & (self._arrays.first["rel"] >= 0) & (split == 0))
            names = [self._entries[image].name for image in training.tolist()]
            marks = held_out(names, validation_images, 5000, validation_choice, self.path)
            split = split.copy()
            split[training[np.array(marks, dtype=bool)]] = 1
        return np.flatnonzero(~self._refused & (split == SPLITS.index(self.split)))

    def _mark_refused_rows(self, images: np.ndarray) -> None:
        """Mark the boxes and relations of these images that are not refused, whether or not `keep` selects them."""
        arrays, findings = self._arrays, self.findings
        self._box_kept, self._relation_kept = (np.zeros(len(a), dtype=bool) for a in (arrays.labels, arrays.predicates))
        rows, _ = arrays.rows("box", images)
        self._box_kept[rows] = ~arrays.refused_boxes(len(self.object_names) - 1, rows, findings)
        rows, owners = arrays.rows("rel", images)
        self._relation_kept[rows] = ~arrays.refused_relations(len(self.predicate_names) - 1, rows, owners, findings)
        for what, noun, kept in (("box", "object", self._box_kept), ("rel", "relation", self._relation_kept)):
            read, _ = arrays.rows(what, np.flatnonzero(~self._refused))
            findings.add("left out", f"{noun} of no image or of a refused one", count=len(kept) - len(read))

    def _chosen(self, images: np.ndarray) -> np.ndarray:
        """Return the images that `keep` selects."""
        if self._keep == "everything":
            return images
        related = self._arrays.first["rel"][images] >= 0
        occupied = related | (self._arrays.first["box"][images] >= 0)
        self.findings.add("left out", "image without objects", count=int((~occupied).sum()))
        if self._keep == "objects":
            return images[occupied]
        self.findings.add("left out", "image without relations", count=int((occupied & ~related).sum()))
        return images[related]

    def _place(self, images: np.ndarray) -> np.ndarray:
        """Compute the boxes in pixels, clip them if the split is for training, and return the images."""
        arrays, findings, clips = self._arrays, self.findings, self.split == "train" and self._keep != "everything"
        corners = arrays.corners()
        self._boxes = np.zeros(corners.shape)
        rows, owners = arrays.rows("box", images)
        rows, owners = rows[self._box_kept[rows]], owners[self._box_kept[rows]]
        sizes = np.array([entry.size for entry in self._entries], dtype=np.float64).reshape(-1, 2)[owners]
        unit = sizes.max(1, keepdims=True) / arrays.long_side
        boxes, kept = corners[rows] * unit, np.full(len(rows), True)
        beyond = are_beyond(boxes, sizes)
        if clips:
            boxes = boxes.clip(0, np.tile(sizes - 1, 2))
            kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
            findings.add("left out", "object outside the image", count=int((~kept).sum()))
        changed = np.flatnonzero(beyond & kept)
        examples = [
            f"image {self._entries[owners[row]].name!r}: box {arrays.numbers[rows[row]].tolist()} in row {rows[row]}"
            for row in changed[:EXAMPLES]
        ]
        findings.add("clipped" if clips else "found", "box beyond the image", examples, len(changed))
        order = "center x, center y, width, height"
        findings.causes += likely_causes(beyond, sizes / unit, arrays.numbers[rows], order)
        self._boxes[rows], self._box_kept[rows] = boxes, kept

        rows, _ = arrays.rows("rel", images)
        rows = rows[self._relation_kept[rows]]
        kept = self._box_kept[arrays.pairs[rows]].all(1)
        findings.add("left out", "relation with a left-out object", count=int((~kept).sum()))
        self._relation_kept[rows] = kept
        return images

    def _used(self, images: np.ndarray) -> np.ndarray:
        """Return the images without those that have lost all relations, if relation models train on them."""
        if self._keep != "related" or self.split != "train":
            return images
        rows, owners = self._arrays.rows("rel", images)
        left = np.isin(images, owners[self._relation_kept[rows]])
        self.findings.add("left out", "image without remaining relations", count=int((~left).sum()))
        return images[left]

    def _count_missing(self) -> None:
        """Record the images without a file, unless no image has one."""
        names = [self._entries[image].file_name for image in self._images.tolist()]
        missing = [name for name in names if self._files.find(name) is None]
        self.findings.add("found", "image without a file", missing, len(missing) if len(missing) < len(names) else 0)

    def _read_entries(self, count: int) -> list[_Entry]:
        """Return the name, file name and size of each image of the HDF5 file."""
        path = self.root / "image_data.json"
        rows = read_json(path)
        if not isinstance(rows, list):
            raise InputError(f"{path}: must be a list of images, got {type(rows).__name__}; {REMEDY}")
        if len(rows) == count + len(CORRUPTED):
            rows = [row for row in rows if not (isinstance(row, dict) and id_text(row.get("image_id")) in CORRUPTED)]
        if len(rows) != count:
            raise InputError(f"{path}: must have the {count} images of {self.path}, got {len(rows)}; {REMEDY}")
        entries, names = [], set[str]()
        for number, row in enumerate(rows):
            try:
                entry = _parse_entry(f"{path}, row {number}", row)
                if entry.name in names:
                    raise InputError(f"{path}, row {number}: image_id must be unique, but {entry.name!r} occurs twice")
                names.add(entry.name)
            except InputError as error:
                if not self._refused[number]:  # an image is counted once
                    self.findings.refuse("image with a malformed entry", f"{error}; {REMEDY}")
                self._refused[number] = True
                entry = _Entry("", "", (1, 1))
            entries.append(entry)
        return entries


def _parse_entry(where: str, row: Any) -> _Entry:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be a JSON object, got {shown(row)}")
    size = parse_size(where, row)
    image_id, file_name = row.get("image_id"), row.get("file_name")
    if image_id is None and file_name is None:
        raise InputError(f"{where}: must have image_id or file_name, but has only {', '.join(map(str, row))}")
    if file_name is not None:
        check_file_name(f"{where}: file_name", file_name)
    name = file_name if image_id is None else id_text(image_id)
    if not name:
        raise InputError(f"{where}: image_id must be an integer or text, got {shown(image_id)}")
    name = name if Path(name).suffix.lower() in image_suffixes() else f"{name}.jpg"
    check_file_name(f"{where}: image_id", name)
    return _Entry(name, name if file_name is None else file_name, size)


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
    root.mkdir(parents=True, exist_ok=True)
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
