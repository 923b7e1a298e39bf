"""Visual features of a data set, cached in HDF5 files by `sgalign cache-features`."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import h5py
import torch
from torch import Tensor

from sgalign.data.batch import GraphBatch, VisualFeatures
from sgalign.errors import InputError
from sgalign.files import HDF5_DAMAGE, check_regular, read_array

FIELDS = ("boxes", "objects", "logits", "union")  # names in the files; "union" becomes `VisualFeatures.unions`


class FeatureCache:
    """A reader of the feature files that `sgalign cache-features` writes.

    Each process opens a file when it first reads from the file. Access to features raises ValueError if a file is cut
    short or is not a feature file. The error names the file.

    Args:
        folder: folder of the feature files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob("features_*.h5"))
        self._header: dict[str, Any] = {}  # of the first file, once `images` has read it
        self._open: dict[tuple[int, Path], h5py.File] = {}  # by process, because HDF5 handles do not survive a fork

    @cached_property
    def images(self) -> dict[str, Path]:
        where = {}
        for path in self.paths:
            check_regular(path)
            try:
                with h5py.File(path, "r") as file:
                    where.update(dict.fromkeys(file, path))
                    header = dict(file.attrs)
                    if not {"weights", "dtype"} <= header.keys():
                        raise OSError("no header")
                    self._header = self._header or header
            except HDF5_DAMAGE as error:
                raise InputError(
                    f"{path}: must be a feature file, but is not one or is cut short ({error}); delete it and run "
                    "sgalign cache-features again"
                ) from error
        return where

    @property
    def header(self) -> dict[str, Any]:
        _ = self.images  # raises an error if a file is damaged
        return self._header

    @property
    def source(self) -> str:
        """The detector weights and image sizes that the features were computed with."""
        return f"{self.header['weights']} at {self.header.get('sizes')}"

    def __contains__(self, image_id: str) -> bool:
        return image_key(image_id) in self.images

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return the features of an image by field, all float32.

        The fields are `boxes` `[N, 4]`, `objects` `[N, F]`, `logits` `[N, C]` and `union` `[N (N - 1), F]`.

        Raises:
            ValueError: if the cache lacks the image.
        """
        if image_id not in self:
            raise InputError(
                f"{self.folder}: has no features of image {image_id!r}; run sgalign cache-features for this data set"
            )
        key = (os.getpid(), self.images[image_key(image_id)])
        if key not in self._open:
            self._open[key] = h5py.File(key[1], "r")
        try:
            group = self._open[key][image_key(image_id)]
            features = {field: torch.from_numpy(read_array(group[field])).float() for field in FIELDS}
            count = len(features["boxes"])
            for field, rows in zip(FIELDS, (count, count, count, count * (count - 1)), strict=True):
                if features[field].dim() != 2 or len(features[field]) != rows:
                    raise ValueError(f"{field} must have {rows} rows, but has shape {list(features[field].shape)}")
            return features
        except HDF5_DAMAGE as error:
            raise InputError(
                f"{key[1]}, image {image_id!r}: is damaged ({error}); delete it and run sgalign cache-features again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def add_to(self, batch: GraphBatch) -> GraphBatch:
        """Return the batch with its cached features.

        Args:
            batch: a batch with all pairs of its images.

        Raises:
            ValueError: if the cache lacks an image, or was computed for boxes that differ from the batch's boxes.
        """
        images = [self[image_id] for image_id in batch.image_ids]
        for image, boxes, image_id in zip(images, batch.boxes_by_image(), batch.image_ids):
            if not torch.equal(image["boxes"], boxes):
                raise InputError(
                    f"{self.folder}: the cached boxes of image {image_id!r} differ from the data's boxes; run "
                    "sgalign cache-features again"
                )
        objects, logits, unions = (torch.cat([image[field] for image in images]) for field in FIELDS[1:])
        return batch._replace(features=VisualFeatures(objects, unions, logits))


def image_key(image_id: str) -> str:
    """Return the name of the HDF5 group that holds an image's features."""
    return quote(image_id, safe="")
