"""Options for reading a data set, and a check of the files to write, which several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from sgalign.data.findings import BadRows
from sgalign.data.splits import ValidationChoice
from sgalign.files import real_path


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the validation images and the treatment of malformed rows."""
    add_validation_options(parser)
    parser.add_argument(
        "--bad-rows",
        choices=get_args(BadRows),
        default="error",
        help="treatment of malformed rows: stop, or leave them out and count them (default: %(default)s)",
    )


def add_validation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the validation images."""
    parser.add_argument(
        "--validation-images",
        type=int,
        metavar="N",
        help="number of training images to hold out if there is no validation split (default: depends on the data set)",
    )
    parser.add_argument(
        "--validation-choice",
        choices=get_args(ValidationChoice),
        default="hash",
        help="images to hold out: those whose names have the lowest hashes, or the first ones (default: %(default)s)",
    )


def add_resized(parser: argparse.ArgumentParser) -> None:
    """Add the option that says to which size a system has resized the images of its predictions."""
    parser.add_argument(
        "--resized",
        type=int,
        nargs=2,
        metavar=("SHORT", "LONG"),
        help="boxes refer to images resized to this short side, with at most this long side, such as 600 1000 in "
        "Scene-Graph-Benchmark's custom_prediction.json (default: boxes are in pixels of the original images)",
    )


def check_kept(parser: argparse.ArgumentParser, read: Iterable[str | Path | None], written: Iterable[Path]) -> None:
    """End the program with the code 2 if a path to write is also a path that the command reads."""
    kept = {real_path(path) for path in read if path is not None}
    for path in written:
        if real_path(path) in kept:
            parser.error(f"{path} must not be written, because the command reads it")


def reading_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of these options as arguments of `open_dataset` and `SceneGraphData`."""
    return {name: getattr(options, name) for name in ("validation_images", "validation_choice", "bad_rows")}
