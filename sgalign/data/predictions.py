"""A writer of HDF5 files of predictions, one image at a time, and a reader of the ids in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import torch

from sgalign.errors import InputError
from sgalign.files import HDF5_DAMAGE, hdf5_written_whole, uninterrupted

FIELDS = {
    "boxes": torch.float32,
    "labels": torch.int64,
    "scores": torch.float32,
    "pairs": torch.int64,
    "predicate_scores": torch.float32,
    "triplets": torch.int64,
    "triplet_scores": torch.float32,
}


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
            return list(_image_ids(file, set()))
    except HDF5_DAMAGE as error:
        raise InputError(f"{path}: must be a complete HDF5 file, but is cut short or damaged ({error})") from error


def _image_ids(group: h5py.Group, seen: set[int], prefix: str = "") -> Iterator[str]:
    """Yield the ids of all images. An id with slashes is stored as nested groups in HDF5.

    `seen` collects the addresses of the groups. Links to one group could give more ids than anyone can read.
    """
    for name, item in group.items():
        if isinstance(item, h5py.Group) and len(item) and all(isinstance(c, h5py.Group) for c in item.values()):
            if (address := h5py.h5o.get_info(item.id).addr) in seen:
                raise ValueError(f"the group {prefix + name!r} also has another name")
            seen.add(address)
            yield from _image_ids(item, seen, f"{prefix}{name}/")
        else:
            yield prefix + name
