"""A data set from its folder, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgalign.data.coco import CocoDataset
from sgalign.data.vg150 import VG150Dataset
from sgalign.data.vrd import VRDDataset
from sgalign.errors import InputError


def open_dataset(root: str | Path, split: Any, *, validation_images: int | None = None) -> Any:
    """Return the part of a data set, whose layout the files tell: VRD's, VG150's or COCO's with `rel.json`.

    Args:
        root: its folder.
        split: "train", "validation" or "test".
        validation_images: how many of the training images are held out; None for the number of the data set's class.

    Raises:
        FileNotFoundError: there is no such folder, or none of the files that tell a layout; names them.
        ValueError: a file is not what it should be, or `validation_images` is given for a data set that has a
            validation part of its own.
    """
    root = Path(root)
    kind: type[Any]
    if (root / "annotations_train.json").exists() or (root / "annotations_test.json").exists():
        kind = VRDDataset
    elif (root / "rel.json").exists():
        if validation_images is not None:
            raise InputError(f"{root}: has a validation part of its own, validation_images must be left out")
        return CocoDataset(root, split)
    elif list(root.glob("*.h5")):
        kind = VG150Dataset
    else:
        raise FileNotFoundError(
            f"{root}: must be a folder with annotations_train.json (VRD), a .h5 file (VG150) or rel.json (COCO)"
        )
    return kind(root, split, validation_images=validation_images)
