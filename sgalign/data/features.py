"""Cached features: what a detector saw of a data set, in HDF5 files."""

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

FIELDS = ("boxes", "objects", "logits", "union")  # as files have them; the last is `VisualFeatures.unions`


class FeatureCache:
    """Reads the files of `cache_features`. Each is opened when it is first read, by each process for itself.

    Args:
        folder: of the files.

    Raises:
        ValueError: a file is cut short or of another program; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob("features_*.h5"))
        self._open: dict[tuple[int, Path], h5py.File] = {}  # by process: HDF5 handles do not survive a fork

    @cached_property
    def images(self) -> dict[str, Path]:
        where = {}
        for path in self.paths:
            try:
                with h5py.File(path, "r") as file:
                    where.update(dict.fromkeys(file, path))
                    if not {"weights", "dtype"} <= set(file.attrs):
                        raise OSError("no header")
            except OSError as error:
                raise InputError(
                    f"{path}: not a file of features, or cut short ({error}): delete it, cache again"
                ) from error
        return where

    @property
    def header(self) -> dict[str, Any]:
        with h5py.File(self.paths[0], "r") as file:
            return dict(file.attrs)

    @property
    def source(self) -> str:
        """Return the weights and image sizes by which these features were made, which tell them from others."""
        return f"{self.header['weights']} at {self.header.get('sizes')}"

    def __contains__(self, image_id: str) -> bool:
        return image_key(image_id) in self.images

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """Return `boxes` `[N, 4]`, `objects` `[N, F]`, `logits` `[N, C]` and `union` `[N * (N - 1), F]`, all float32.

        Raises:
            ValueError: the image is not there.
        """
        if image_id not in self:
            raise InputError(
                f"{self.folder}: has no features of image {image_id!r}: run sgalign cache-features for its data"
            )
        key = (os.getpid(), self.images[image_key(image_id)])
        if key not in self._open:
            self._open[key] = h5py.File(key[1], "r")
        group = self._open[key][image_key(image_id)]
        return {field: torch.from_numpy(group[field][()]).float() for field in FIELDS}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def add_to(self, batch: GraphBatch) -> GraphBatch:
        """Return the batch, which has all pairs of its images, with their features.

        Raises:
            ValueError: an image is not there, or its boxes are not those that were seen.
        """
        images = [self[image_id] for image_id in batch.image_ids]
        for image, boxes, image_id in zip(images, batch.boxes_by_image(), batch.image_ids):
            if not torch.equal(image["boxes"], boxes):
                raise InputError(f"{self.folder}: image {image_id!r} was seen with other boxes: cache its data again")
        objects, logits, unions = (torch.cat([image[field] for image in images]) for field in FIELDS[1:])
        return batch._replace(features=VisualFeatures(objects, unions, logits))


def image_key(image_id: str) -> str:
    """Return the name of an image's group in a file."""
    return quote(image_id, safe="")
