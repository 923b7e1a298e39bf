"""Prediction files of any system, written one image at a time and read for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.files import HDF5_DAMAGE, hdf5_written_whole, read_json, uninterrupted

FIELDS = {
    "boxes": torch.float32,
    "labels": torch.int64,
    "scores": torch.float32,
    "pairs": torch.int64,
    "predicate_scores": torch.float32,
    "triplets": torch.int64,
    "triplet_scores": torch.float32,
}
WRITTEN = "use a JSON file of predictions, or an HDF5 file from the callback sgalign.training.PredictionWriter"


class PredictionFile:
    """A writer of the HDF5 file of predictions that `sgalign evaluate` reads.

    Use it in a `with` block. Until the block ends, the content is in a file beside `path` whose name ends in
    `.partial`. If the block ends without an error, this file moves to `path`. Otherwise it is deleted.

    Args:
        path: the file to write. An existing file is replaced.
    """

    def __init__(self, path: str | Path) -> None:
        self._written = hdf5_written_whole(path)
        self._folders: set[str] = set()

    def __enter__(self) -> PredictionFile:
        self._file = self._written.__enter__()
        return self

    def write(self, image_id: str, prediction: Mapping[str, Any]) -> None:
        """Add the prediction for one image.

        Args:
            image_id: name of the image.
            prediction: tensors or arrays by field, as `SceneGraphEvaluator.update` accepts them.

        Raises:
            ValueError: if the image was written before, or HDF5 does not allow its name.
            OSError: if the disk is full. The error may occur only at the end of the block.
        """
        parts = image_id.split("/")
        folders = {"/".join(parts[:count]) for count in range(1, len(parts))}
        if not {"", "."}.isdisjoint(parts) or "\0" in image_id:
            raise InputError(f"image_id must be one name, or several joined by single slashes, got {image_id!r}")
        if image_id in self._folders or any(folder in self._file and folder not in self._folders for folder in folders):
            raise InputError(
                f"image_id must not extend another image_id by a slash, as 'a/b' extends 'a', got {image_id!r}"
            )
        if image_id in self._file:
            raise InputError(f"image_id must be new, but {image_id!r} has already been written")
        self._folders |= folders
        fields = {name: torch.as_tensor(prediction[name]).detach().cpu() for name in FIELDS if name in prediction}
        with uninterrupted():
            group = self._file.create_group(image_id)
            try:
                for name, tensor in fields.items():
                    group[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            except Exception:  # such as a full disk, after which the file may be kept
                del self._file[image_id]
                for folder in sorted(folders, key=len, reverse=True):
                    if not len(self._file[folder]):
                        del self._file[folder]
                raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._written.__exit__(kind, error, trace)


def prediction_ids(path: Path) -> list[str]:
    """Return the ids of the images in an HDF5 file of predictions.

    Raises:
        ValueError: if the file is not HDF5, or is cut short. The error names the file.
    """
    try:
        with h5py.File(path, "r") as file:
            return list(_image_ids(file))
    except HDF5_DAMAGE as error:
        raise InputError(f"{path}: must be a complete HDF5 file, but is cut short or damaged ({error})") from error


class Predictions:
    """The predictions of a file by image id.

    An HDF5 file is read one image at a time. A JSON file is read as a whole.

    Args:
        path: the file. In HDF5, each image has a group named by its id, with one data set per field. JSON is an object
            that maps image ids to lists by field.
        num_predicates: number of predicate classes without the background.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither HDF5 nor JSON, is cut short, or has a field that is not numeric. The error
            names the file, the image and the field.
    """

    def __init__(self, path: str | Path, num_predicates: int) -> None:
        self.path = Path(path)
        # An empty JSON list has no second dimension. `_typed` adds it from these widths.
        self._widths = {"boxes": 4, "pairs": 2, "predicate_scores": num_predicates + 1, "triplets": 3}
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such prediction file")
        self._images: Mapping[str, Any]
        if h5py.is_hdf5(self.path):
            try:
                self._images = h5py.File(self.path, "r")
                self.image_ids = set(_image_ids(self._images))
            except HDF5_DAMAGE as error:
                raise InputError(
                    f"{self.path}: must be a complete HDF5 file, but is cut short or damaged ({error})"
                ) from error
            return
        self._images = read_json(self.path, WRITTEN)
        if not isinstance(self._images, dict):
            raise InputError(
                f"{self.path}: must be a JSON object with image ids as keys, got {type(self._images).__name__}; "
                f"{WRITTEN}"
            )
        self.image_ids = set(self._images)

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return the fields that the file has for an image, as `SceneGraphEvaluator.update` accepts them."""
        where = f"{self.path}, image {image_id!r}"
        try:
            image = self._images[image_id]
            there = FIELDS.keys() & image.keys() if isinstance(image, Mapping) else None
        except HDF5_DAMAGE as error:
            raise InputError(f"{where}: is damaged ({error})") from error
        if there is None:
            raise InputError(f"{where}: must have fields such as boxes and labels, got {type(image).__name__}")
        fields = {}
        for field in there:
            try:
                value = self._read(image[field], FIELDS[field].is_floating_point)
            except HDF5_DAMAGE as error:
                raise InputError(f"{where}: {field} must be numbers in rows of equal length ({error})") from error
            fields[field] = self._typed(where, field, value)
        return fields

    def _read(self, values: Any, fractions: bool) -> Tensor:
        """Return the values of an HDF5 data set or of lists. Floating-point lists become float64."""
        if isinstance(values, h5py.Group):
            raise TypeError("the field is an HDF5 group")
        if isinstance(values, h5py.Dataset):
            array = values[()]
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufc":
                raise TypeError(f"the field holds {getattr(array, 'dtype', type(array).__name__)}")
            if array.dtype.kind == "u" and array.size and array.max() > torch.iinfo(torch.int64).max:
                raise ValueError(f"{array.max()} does not fit in 64 bits with a sign")
            wide = array.dtype.kind == "f" and array.dtype.itemsize > 8  # torch has no such type
            return torch.as_tensor(array.astype(np.float64 if wide else array.dtype.newbyteorder("="), copy=False))
        return torch.as_tensor(values, dtype=torch.float64 if fractions else None)

    def _typed(self, where: str, field: str, value: Tensor) -> Tensor:
        whole = FIELDS[field] == torch.int64
        if whole and value.is_floating_point() and value.numel():
            raise InputError(f"{where}: {field} must be whole numbers, got {value.dtype}")
        if value.dtype == torch.bool:
            raise InputError(f"{where}: {field} must be numbers, got true and false")
        if value.is_complex():
            raise InputError(f"{where}: {field} must be real numbers, got {value.dtype}")
        value = value.long() if whole else value if value.is_floating_point() else value.float()
        return value.reshape(0, self._widths[field]) if field in self._widths and value.shape == (0,) else value


class PredictionFiles:
    """The predictions of several files by image id, such as the files of the parts of a data set.

    Args:
        paths: the files, as for `Predictions`.
        num_predicates: number of predicate classes without the background.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if an image is in several of the files, or as for `Predictions`.
    """

    def __init__(self, paths: Sequence[str | Path], num_predicates: int) -> None:
        self._file_of: dict[str, Predictions] = {}
        for file in [Predictions(path, num_predicates) for path in paths]:
            for image_id in file.image_ids:
                if (other := self._file_of.setdefault(image_id, file)) is not file:
                    where = f"{other.path} and {file.path}"
                    raise InputError(f"image {image_id!r} must be in one file only, but is in {where}")
        self.image_ids = set(self._file_of)

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return the fields for an image, as `Predictions` does."""
        return self._file_of[image_id][image_id]


def _image_ids(group: h5py.Group, prefix: str = "") -> Iterator[str]:
    """Yield the ids of all images. An id with slashes is stored as nested groups in HDF5."""
    for name, item in group.items():
        if isinstance(item, h5py.Group) and len(item) and all(isinstance(c, h5py.Group) for c in item.values()):
            yield from _image_ids(item, f"{prefix}{name}/")
        else:
            yield prefix + name
