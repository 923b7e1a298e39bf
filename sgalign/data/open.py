"""A data set from its folder, whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sgalign.data.scene_graph import SceneGraph
from sgalign.data.vrd import VRDDataset


def open_dataset(root: str | Path, split: Any, **options: Any) -> Any:
    """The part of a data set, whose layout the files tell: VRD's, VG150's or COCO's with `rel.json`.

    Args:
        root: its folder.
        split: "train", "validation" or "test".
        options: of the data set's class, such as `validation_images`.

    Raises:
        FileNotFoundError: there is no such folder, or none of the files that tell a layout; names them.
        TypeError: the data set takes no such option.
    """
    root = Path(root)
    kind: type[Dataset[SceneGraph]]
    if (root / "annotations_train.json").exists() or (root / "annotations_test.json").exists():
        kind = VRDDataset
    elif (root / "rel.json").exists():
        from sgalign.data.coco import CocoDataset

        kind = CocoDataset
        if options.pop("validation_images", None) is not None:
            raise ValueError(f"{root}: has a validation part of its own, validation_images must be left out")
    elif list(root.glob("*.h5")):
        from sgalign.data.vg150 import VG150Dataset

        kind = VG150Dataset
    else:
        raise FileNotFoundError(
            f"{root}: must be a folder with annotations_train.json (VRD), a .h5 file (VG150) or rel.json (COCO)"
        )
    return kind(root, split, **options)
