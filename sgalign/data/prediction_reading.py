"""Predictions of any system, read from files for the images of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from sgalign.data.class_names import id_text
from sgalign.data.findings import warn
from sgalign.data.graph_lines import is_graph_lines, read_graph_lines
from sgalign.data.image_ids import ImageIds
from sgalign.data.images import Size
from sgalign.data.prediction_fields import standard_fields
from sgalign.data.predictions import FIELDS, prediction_ids
from sgalign.data.scene_graph import SceneGraph, SceneGraphDataset
from sgalign.data.sgb_results import is_results, read_custom, read_results
from sgalign.errors import InputError, shown
from sgalign.files import HDF5_DAMAGE, read_array, read_json

SEE = "docs/evaluation.md lists the files that are read"
ID_KEYS = ("image_id", "file_name", "id")


class Annotations(NamedTuple):
    """The split of a data set that predictions belong to.

    Attributes:
        object_names, predicate_names: class names, background first.
        graphs: the annotated scene graphs.
        image_names: names of images by their ids in the files of the data set, see `SceneGraphDataset`.
    """

    object_names: list[str]
    predicate_names: list[str]
    graphs: Sequence[SceneGraph]
    image_names: Mapping[str, str]

    @classmethod
    def of(cls, dataset: SceneGraphDataset) -> Annotations:
        """Return the annotations of a data set, all of them in memory."""
        return cls(dataset.object_names, dataset.predicate_names, list(dataset), dataset.image_names)


class Predictions:
    """The predictions of a file by image id.

    An HDF5 file is read one image at a time. Other files are read as a whole. `docs/evaluation.md` describes the files,
    and `standard_fields` the fields of an image.

    The name of an image in the file may be its id in the data set, its file name with or without folders and suffix, or
    the id that the files of the data set give it.

    Args:
        path: the file.
        annotations: the split that the predictions belong to.
        resized: None if boxes are in pixels of the original images. If the system resized its images, the length of the
            short side and the maximum of the long side to which it did.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file has none of these forms or is cut short, if two predictions are of the same image, or if
            a field is not numeric. The error names the file, the image and the field.
    """

    def __init__(self, path: str | Path, annotations: Annotations, *, resized: tuple[int, int] | None = None) -> None:
        self.path, self.annotations, self.resized = Path(path), annotations, resized
        if resized is not None and not 1 <= resized[0] <= resized[1]:
            raise InputError(f"resized must be the short and the long side, each at least 1, got {list(resized)}")
        # An empty JSON list has no second dimension. `_typed` adds it from these widths.
        predicates = len(annotations.predicate_names)
        self._widths = {"boxes": 4, "pairs": 2, "predicate_scores": predicates, "triplets": 3}
        self._graphs = {graph.image_id: graph for graph in annotations.graphs}
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such prediction file")
        if h5py.is_hdf5(self.path):
            keys = prediction_ids(self.path)  # raises an error if the file is damaged
            self._images: Mapping[str, Any] = h5py.File(self.path, "r")
        else:
            self._images = self._read_whole()
            keys = list(self._images)
        self._keys: dict[str, str] = {}
        ids = ImageIds(self._graphs, annotations.image_names)
        for key in keys:
            if (other := self._keys.setdefault(ids.find(f"{self.path}: an image", key) or key, key)) != key:
                raise InputError(f"{self.path}: every image must occur once, but {other!r} and {key!r} are the same")
        self.image_ids = set(self._keys)

    def _read_whole(self) -> Mapping[str, Any]:
        """Return the fields of each image by its name in the file, which is not HDF5."""
        own_size = is_results(self.path) or is_graph_lines(self.path)
        if own_size and self.resized is not None:
            raise InputError(
                f"{self.path}: --resized must be left out, because the sizes of the images in such a file are known"
            )
        if is_results(self.path):
            return read_results(self.path, self.annotations.graphs)
        if is_graph_lines(self.path):
            return self._by_name([line.graph for line in read_graph_lines(self.path)])
        content = read_json(self.path, SEE)
        if isinstance(content, dict) and isinstance(content.get("images"), list):
            rows = enumerate(content["images"])
            return self._by_name([_of_sgbench(f"{self.path}, images, row {number}", row) for number, row in rows])
        if isinstance(content, list):
            return self._by_name(content)
        if not isinstance(content, dict):
            raise InputError(
                f"{self.path}: must be a JSON object with image ids as keys, or a list of images, got "
                f"{type(content).__name__}; {SEE}"
            )
        if content and all(isinstance(image, dict) and "bbox_labels" in image for image in content.values()):
            if self.resized is None:
                warn(
                    f"{self.path}: boxes are read as pixels of the original images. Scene-Graph-Benchmark writes boxes "
                    "of images that it has resized. For such boxes, add --resized 600 1000, its default sizes"
                )
            return read_custom(self.path, content, self.annotations.predicate_names)
        return content

    def _by_name(self, images: list[Any]) -> dict[str, Any]:
        by_name: dict[str, Any] = {}
        if images and isinstance(images[0], dict) and images[0].keys() >= {"category_id", "bbox", "score"}:
            raise InputError(f"{self.path}: must have relations, but has COCO results; pass it with --detections")
        for number, image in enumerate(images):
            given = [image[key] for key in ID_KEYS if image.get(key) is not None] if isinstance(image, dict) else []
            if not given or (name := id_text(given[0])) is None:
                raise InputError(
                    f"{self.path}, row {number}: must have {', '.join(ID_KEYS[:-1])} or {ID_KEYS[-1]}, a number or "
                    f"text, got {shown(image)}; {SEE}"
                )
            if name in by_name:
                raise InputError(f"{self.path}, row {number}: every image must occur once, but {name!r} occurs twice")
            by_name[name] = image
        return by_name

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return the fields that the file has for an image, as `SceneGraphEvaluator.update` accepts them."""
        where = f"{self.path}, image {self._keys[image_id]!r}"
        try:
            image = self._images[self._keys[image_id]]
            names = self.annotations.object_names, self.annotations.predicate_names
            given = standard_fields(where, image, names) if isinstance(image, Mapping) else None
        except InputError:
            raise
        except HDF5_DAMAGE as error:
            raise InputError(f"{where}: is damaged ({error})") from error
        if given is None:
            raise InputError(f"{where}: must have fields such as boxes and labels, got {type(image).__name__}")
        fields = {}
        for field, values in given.items():
            try:
                value = _read(values, FIELDS[field].is_floating_point)
            except HDF5_DAMAGE as error:
                raise InputError(f"{where}: {field} must be numbers in rows of equal length ({error})") from error
            fields[field] = self._typed(where, field, value)
        if self.resized is not None and image_id in self._graphs and "boxes" in fields:
            graph = self._graphs[image_id]
            fields["boxes"] = _at_original_size(where, fields["boxes"], (graph.width, graph.height), self.resized)
        return fields

    def _typed(self, where: str, field: str, value: Tensor) -> Tensor:
        whole = FIELDS[field] == torch.int64
        if whole and value.is_floating_point() and value.numel():
            raise InputError(f"{where}: {field} must be whole numbers, got {value.dtype}")
        if value.dtype == torch.bool:
            raise InputError(f"{where}: {field} must be numbers, got true and false")
        if value.is_complex():
            raise InputError(f"{where}: {field} must be real numbers, got {value.dtype}")
        value = value.long() if whole else value if value.is_floating_point() else value.float()
        if field == "labels" and value.numel() and value.min() < 1:
            got = f"got {value.min().item()}; add 1 if the system counts classes from 0"
            raise InputError(f"{where}: labels must be at least 1, {got}")
        return value.reshape(0, self._widths[field]) if field in self._widths and value.shape == (0,) else value


class PredictionFiles:
    """The predictions of several files by image id, such as the files of the parts of a data set.

    Args:
        paths: the files, as for `Predictions`.
        annotations, resized: as for `Predictions`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an image is in several of the files, or as for `Predictions`.
    """

    def __init__(
        self, paths: Sequence[str | Path], annotations: Annotations, *, resized: tuple[int, int] | None = None
    ) -> None:
        self._file_of: dict[str, Predictions] = {}
        for file in [Predictions(path, annotations, resized=resized) for path in paths]:
            for image_id in file.image_ids:
                if (other := self._file_of.setdefault(image_id, file)) is not file:
                    where = f"{other.path} and {file.path}"
                    raise InputError(f"image {image_id!r} must be in one file only, but is in {where}")
        self.image_ids = set(self._file_of)

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return the fields for an image, as `Predictions` does."""
        return self._file_of[image_id][image_id]


def _of_sgbench(where: str, image: Any) -> Any:
    """Return an image of sgbench's file. Its classes count from 0, and its triplets have no scores but their order."""
    keys = ("bboxes", "categories", "triplets")
    if not isinstance(image, dict) or not all(isinstance(image.get(key), list) for key in keys):
        raise InputError(f"{where}: must have id, and the lists {', '.join(keys)}, got {shown(image)}")
    triplets = image["triplets"]
    return {
        "id": image.get("id"),
        "boxes": image["bboxes"],
        "labels": [label + 1 if type(label) is int else label for label in image["categories"]],
        "triplets": [[*row[:2], row[2] + 1] if _is_triplet(row) else row for row in triplets],
        "triplet_scores": [1 - number / len(triplets) for number in range(len(triplets))],
    }


def _is_triplet(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and type(row[2]) is int


def _read(values: Any, fractions: bool) -> Tensor:
    """Return the values of an HDF5 data set, a tensor or lists. Floating-point lists become float64."""
    if isinstance(values, (h5py.Group, Mapping)):
        raise TypeError("the field is a group of fields")
    if isinstance(values, h5py.Dataset):
        array = read_array(values)
        if array.dtype.kind == "u" and array.size and array.max() > torch.iinfo(torch.int64).max:
            raise ValueError(f"{array.max()} does not fit in 64 bits with a sign")
        wide = array.dtype.kind == "f" and array.dtype.itemsize > 8  # torch has no such type
        return torch.as_tensor(array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False))
    if isinstance(values, Tensor):
        return values
    if _has_truth(values):
        raise TypeError("it has true or false")
    return torch.as_tensor(values, dtype=torch.float64 if fractions else None)


def _has_truth(values: Any) -> bool:
    """Return True if lists contain True or False, which torch would read as 1 and 0 among numbers."""
    while isinstance(values, list):
        kinds = set(map(type, values))
        if bool in kinds:
            return True
        values = list(chain.from_iterable(values)) if kinds == {list} else None
    return isinstance(values, bool)


def _at_original_size(where: str, boxes: Tensor, size: Size, resized: tuple[int, int]) -> Tensor:
    """Return boxes of an image that was resized, in pixels of the original image.

    The resized size is that of `Resize` in maskrcnn-benchmark, which Scene-Graph-Benchmark uses: the short side gets
    its length, unless the long side then exceeds its maximum.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise InputError(f"{where}: boxes must have 4 numbers each, got shape {tuple(boxes.shape)}")
    short, longest = resized
    low, high = min(size), max(size)
    if high / low * short > longest:
        short = round(longest * low / high)
    sides = [short if side == low else int(short * side / low) for side in size]
    return boxes * torch.tensor([whole / side for whole, side in zip(size, sides, strict=True)] * 2)
