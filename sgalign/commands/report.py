"""Make tables and figures from the runs of `sgalign ablate`. Each difference in the tables has an interval."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgalign.data import load_image
from sgalign.files import check_writable
from sgalign.studies import report
from sgalign.studies.mirror_figure import draw_mirror


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign report FOLDER` and return the exit code."""
    parser = argparse.ArgumentParser("sgalign report", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder that sgalign ablate has written (with --checkpoint: folder for the figure)")
    add("--study", nargs="+", metavar="NAME", help="names of the studies, such as table1 (default: all in the folder)")
    add(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint of Align-SGTR: draw its attention in the photograph --image, and make no tables",
    )
    add("--image", type=Path, metavar="FILE", help="photograph for --checkpoint")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.image is None):
        parser.error("--checkpoint and --image must be given together")
    if options.checkpoint is None:
        report.write(options.folder, options.study)
        return 0
    if options.study is not None:
        parser.error("--study selects runs and cannot be used with --checkpoint")
    out = options.folder / f"mirror_{options.image.stem}.png"
    check_writable(out)
    draw_mirror(options.checkpoint, load_image(options.image), options.image.name, out)
    return 0
