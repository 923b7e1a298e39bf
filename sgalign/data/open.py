"""Functions that open a data set folder of any supported layout and list its splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgalign.data.class_names import first_difference
from sgalign.data.coco import CocoDataset
from sgalign.data.findings import BadRows
from sgalign.data.gqa import GQADataset
from sgalign.data.open_images import OpenImagesDataset
from sgalign.data.psg import PSGDataset
from sgalign.data.splits import Split, ValidationChoice
from sgalign.data.vg150 import Keep, VG150Dataset
from sgalign.data.vrd import VRDDataset
from sgalign.errors import InputError

NO_TRAINING = "there is no training split to find zero-shot triplets and groups by frequency"
# The data sets by layout, with the files that a folder of the layout has.
LAYOUTS: dict[str, tuple[type[Any], str]] = {
    "VRD": (VRDDataset, "annotations_train.json or annotations_test.json"),
    "VG150": (VG150Dataset, "a .h5 file"),
    "COCO with relations": (CocoDataset, "train.json or test.json, or train/_annotations.coco.json"),
    "PSG": (PSGDataset, "psg.json"),
    "Open Images": (OpenImagesDataset, "a file that ends in -vrd.csv, or vrd-train-anno.json"),
    "GQA": (GQADataset, "train_sceneGraphs.json"),
}


def open_dataset(
    root: str | Path,
    split: Split,
    *,
    validation_images: int | None = None,
    validation_choice: ValidationChoice = "hash",
    bad_rows: BadRows = "error",
    keep: Keep = "related",
) -> Any:
    """Return one split of a data set in any of the layouts: VRD, VG150, COCO with relations, PSG, Open Images or GQA.

    The files in the folder determine the layout.

    Args:
        root: folder of the data set.
        split: "train", "validation" or "test".
        validation_images: number of training images to hold out. If None, the default of the data set's class.
        validation_choice: "hash" or "first", see `sgalign.data.splits.held_out`.
        bad_rows: "error" to raise an error if a row is malformed, "skip" to leave out such rows.
        keep: "related", "objects" or "everything", see `VG150Dataset`. The other layouts always keep everything.

    Raises:
        FileNotFoundError: if the folder does not exist or has no files of a known layout. The error names the files of
            the known layouts.
        ValueError: if a file is malformed, if the folder has files of several layouts or several files of a split, or
            if validation images are chosen in a data set with its own validation split.
    """
    kind = _layout(Path(root))
    options: dict[str, Any] = {"validation_images": validation_images, "validation_choice": validation_choice}
    if kind is VG150Dataset:
        options["keep"] = keep
    return kind(root, split, bad_rows=bad_rows, **options)


def splits_of(root: str | Path) -> list[Split]:
    """Return the splits for which a data set folder has files. A folder may have only a test split, for example.

    Raises:
        FileNotFoundError, ValueError: as in `open_dataset`.
    """
    root = Path(root)
    splits: list[Split] = _layout(root).splits_in(root)
    return splits


def check_same_classes(where: str, reference: Any, split: Split, dataset: Any) -> None:
    """Raise InputError unless a split has the classes and predicates of a reference, in the same order.

    Args:
        where: the data set, for messages.
        reference: another split, or anything with `object_names` and `predicate_names`.
        split, dataset: the split.
    """
    for kind in ("object_names", "predicate_names"):
        names, others = getattr(reference, kind), getattr(dataset, kind)
        if others != names:
            difference = first_difference(names, others)
            raise InputError(f"{where}: {kind} must be the same in all splits, but in {split}, {difference}")


def annotation_files(root: str | Path) -> list[Path]:
    """Return the files of a data set folder that its annotations are read from, sorted.

    Raises:
        FileNotFoundError, ValueError: as in `open_dataset`.
    """
    root = Path(root)
    found = {path for pattern in _layout(root).annotation_files for path in root.glob(pattern)}
    return sorted(path for path in found if not path.name.startswith("."))


def _layout(root: Path) -> type[Any]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: must be a folder with a data set, but there is no such folder")
    found = {name: kind for name, (kind, _) in LAYOUTS.items() if kind.splits_in(root)}
    if not found:
        files = "; ".join(f"{name}: {files}" for name, (_, files) in LAYOUTS.items())
        raise FileNotFoundError(f"{root}: must be a folder with the files of a known layout ({files})")
    if len(found) > 1:
        raise InputError(f"{root}: must be a folder with the files of one layout, but has those of {', '.join(found)}")
    return next(iter(found.values()))
