"""Functions that open a data set folder of any supported layout and list its splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgalign.data.coco import FILES, CocoDataset
from sgalign.data.findings import BadRows
from sgalign.data.splits import SPLITS, Split, ValidationChoice
from sgalign.data.vg150 import Keep, VG150Dataset
from sgalign.data.vrd import VRDDataset
from sgalign.errors import InputError

NO_TRAINING = "there is no training split to find zero-shot triplets and groups by frequency"


def open_dataset(
    root: str | Path,
    split: Split,
    *,
    validation_images: int | None = None,
    validation_choice: ValidationChoice = "hash",
    bad_rows: BadRows = "error",
    keep: Keep = "related",
) -> Any:
    """Return one split of a data set in the layout of VRD, of VG150, or of COCO with `rel.json`.

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
        ValueError: if a file is malformed, or if validation images are chosen in a data set with its own validation
            split.
    """
    kind = _layout(Path(root))
    options: dict[str, Any] = {"validation_images": validation_images, "validation_choice": validation_choice}
    if kind is VG150Dataset:
        options["keep"] = keep
    return kind(root, split, bad_rows=bad_rows, **options)


def splits_of(root: str | Path) -> list[Split]:
    """Return the splits for which a data set folder has files. A folder may have only a test split, for example.

    Raises:
        FileNotFoundError: as in `open_dataset`.
    """
    root = Path(root)
    kind = _layout(root)
    if kind is VG150Dataset:
        return list(SPLITS)
    if kind is VRDDataset:
        files = {split: f"annotations_{'test' if split == 'test' else 'train'}.json" for split in SPLITS}
    else:
        files = {split: f"{name}.json" for split, name in FILES.items()}
        if not (root / files["validation"]).exists():
            files["validation"] = files["train"]
    splits = [split for split in SPLITS if (root / files[split]).exists()]
    if not splits:
        raise FileNotFoundError(f"{root}: must have {' or '.join(dict.fromkeys(files.values()))} beside rel.json")
    return splits


def _layout(root: Path) -> type[Any]:
    signs = {
        VRDDataset: any((root / f"annotations_{part}.json").exists() for part in ("train", "test")),
        CocoDataset: (root / "rel.json").exists(),
        VG150Dataset: any(root.glob("*.h5")),
    }
    kinds = [kind for kind, found in signs.items() if found]
    wanted = "annotations_train.json (VRD), a .h5 file (VG150) or rel.json (COCO)"
    if not kinds:
        raise FileNotFoundError(f"{root}: must be a folder with {wanted}")
    if len(kinds) > 1:
        raise InputError(f"{root}: must be a folder with only one of {wanted}, but has several of them")
    return kinds[0]
