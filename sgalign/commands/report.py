"""Make tables and figures from the runs of `sgalign ablate`. Each difference in the tables has an interval."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgalign.commands import studies
from sgalign.files import check_writable


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign report FOLDER` and return the exit code."""
    parser = argparse.ArgumentParser("sgalign report", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder that sgalign ablate has written (with --checkpoint: folder for the figure)")
    every = "(default: all studies that have at least one run for each row of their table)"
    add(
        "--study",
        nargs="+",
        choices=studies.STUDIES,
        metavar="STUDY",
        help=f"studies to report {every}",
    )
    add("--data", metavar="NAME", help="name of the data set in the runs, needed if they used several")
    add("--epochs", type=int, metavar="N", help="number of epochs, needed if it differs between runs")
    add(
        "--checkpoint",
        metavar="FILE",
        help="checkpoint of Align-SGTR: draw its attention in the photograph --image, and make no tables",
    )
    add("--image", type=Path, metavar="FILE", help="photograph for --checkpoint")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.image is None):
        parser.error("--checkpoint and --image must be given together")
    if options.checkpoint is not None:
        for name in ("study", "data", "epochs"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} selects runs and cannot be used with --checkpoint")
        from sgalign.commands.mirror_figure import draw_mirror

        out = options.folder / f"mirror_{options.image.stem}.png"
        check_writable(out)
        draw_mirror(options.checkpoint, options.image, out)
        return 0
    studies.tabulate(options.folder, options.study, options.data, options.epochs)
    return 0
