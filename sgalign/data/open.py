"""A function that opens a data set folder of any supported layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgalign.data.coco import CocoDataset
from sgalign.data.vg150 import VG150Dataset
from sgalign.data.vrd import VRDDataset
from sgalign.errors import InputError


def open_dataset(root: str | Path, split: Any, *, validation_images: int | None = None) -> Any:
    """Return one split of a data set in the layout of VRD, of VG150, or of COCO with `rel.json`.

    The files in the folder determine the layout.

    Args:
        root: folder of the data set.
        split: "train", "validation" or "test".
        validation_images: number of training images to hold out. If None, the default of the data set's class.

    Raises:
        FileNotFoundError: if the folder does not exist or has no files of a known layout. The error names the files of
            the known layouts.
        ValueError: if a file is malformed, or if `validation_images` is given for a data set with its own validation
            split.
    """
    root = Path(root)
    kind: type[Any]
    if (root / "annotations_train.json").exists() or (root / "annotations_test.json").exists():
        kind = VRDDataset
    elif (root / "rel.json").exists():
        if validation_images is not None:
            raise InputError(f"{root}: has its own validation split, so validation_images must be left out")
        return CocoDataset(root, split)
    elif list(root.glob("*.h5")):
        kind = VG150Dataset
    else:
        raise FileNotFoundError(
            f"{root}: must be a folder with annotations_train.json (VRD), a .h5 file (VG150) or rel.json (COCO)"
        )
    return kind(root, split, validation_images=validation_images)
