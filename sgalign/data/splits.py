"""The splits of a data set, and the choice of the validation images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from sgalign.errors import InputError

Split = Literal["train", "validation", "test"]
ValidationChoice = Literal["hash", "first"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def check_split(split: str) -> None:
    """Raise InputError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")


def held_out(
    names: Sequence[str], wanted: int | None, default: int, choice: ValidationChoice, path: Path
) -> list[bool]:
    """Return a list with True for each training image that is held out for validation.

    Args:
        names: names of the training images.
        wanted: number of images to hold out. If None, the smaller of `default` and a fifth of the images.
        default: default number of the data set.
        choice: "hash" for the images whose names have the lowest hashes. This choice depends on no random generator and
            on no order, so the images resemble the rest even if the file is sorted. A larger choice contains every
            smaller one. "first" for the first images of the file.
        path: file of the training images, for the error message.

    Raises:
        ValueError: if `wanted` is not from 0 to the number of images, or `choice` is unknown.
    """
    if choice not in ("hash", "first"):
        raise InputError(f"validation_choice must be 'hash' or 'first', got {choice!r}")
    count = min(default, len(names) // 5) if wanted is None else wanted
    if not 0 <= count <= len(names):
        raise InputError(
            f"validation_images must be from 0 to {len(names)}, the number of images in {path}, got {wanted}"
        )
    order = sorted(range(len(names)), key=lambda i: _stable_hash(names[i])) if choice == "hash" else range(len(names))
    chosen = set(order[:count])
    return [index in chosen for index in range(len(names))]


def split_files(root: Path, folder: str, names: Mapping[Split, str]) -> dict[Split, Path]:
    """Return the files of the splits that exist in `root` or in its subfolder `folder`.

    Raises:
        ValueError: if a file is in both.
    """
    files: dict[Split, Path] = {}
    for split, name in names.items():
        found = [path for path in (root / name, root / folder / name) if path.exists()]
        if len(found) > 1:
            raise InputError(f"{root}: must have one file {name}, but has {' and '.join(map(str, found))}")
        if found:
            files[split] = found[0]
    return files


def splits_from(files: Mapping[Split, Path]) -> list[Split]:
    """Return the splits that can be read from one file per split. Validation images may come from the training file."""
    return [split for split in SPLITS if split in files or (split == "validation" and "train" in files)]


def split_file(
    root: Path, files: Mapping[Split, Path], split: Split, wanted: int | None, choice: ValidationChoice
) -> Path:
    """Return the file that has the images of a split. Without a validation file, validation images are training images.

    Raises:
        FileNotFoundError: if the folder has no such file.
        ValueError: if there is no such split, or if options choose validation images although there is a validation
            file.
    """
    check_split(split)
    if "validation" in files:
        check_has_no_validation(root, wanted, choice)
    path = files.get(split, files.get("train") if split == "validation" else None)
    if path is None:
        has = ", ".join(str(path) for path in files.values()) or "no file of a split"
        raise FileNotFoundError(f"{root}: must have a file of the {split} split, but has {has}")
    return path


def in_split(
    names: Sequence[str], files: Mapping[Split, Path], split: Split, wanted: int | None, choice: ValidationChoice
) -> list[bool]:
    """Return a list with True for each image of the file of a split that belongs to the split.

    Without a validation file, the validation split has 5000 of the training images, but at most a fifth of them, unless
    `wanted` is another number.
    """
    if split == "test" or "validation" in files:
        return [True] * len(names)
    return [mark == (split == "validation") for mark in held_out(names, wanted, 5000, choice, files["train"])]


def check_has_no_validation(path: Path, wanted: int | None, choice: ValidationChoice) -> None:
    """Raise InputError if options choose validation images although the data set has its own validation split."""
    for name, given in (("validation_images", wanted is not None), ("validation_choice", choice != "hash")):
        if given:
            raise InputError(f"{path}: has its own validation split, so {name} must be left out")


def _stable_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
