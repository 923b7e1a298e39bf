"""Tables and figures of `sgalign ablate`'s runs: what settings reach, and which differences are more than noise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgalign.commands import studies
from sgalign.files import check_writable


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign report FOLDER`; return the exit code."""
    parser = argparse.ArgumentParser("sgalign report", description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="folder that sgalign ablate has written; with --checkpoint, where the figure goes")
    every = "(default: studies with a run of every row)"
    add(
        "--study",
        nargs="+",
        choices=studies.STUDIES,
        metavar="STUDY",
        help=f"what to table, in place of all other studies {every}",
    )
    add("--data", metavar="NAME", help="which data, where the runs are of several")
    add("--epochs", type=int, metavar="N", help="which number of epochs, where the runs have several")
    add("--checkpoint", metavar="FILE", help="draw what this Align-SGTR attends to in --image instead")
    add("--image", type=Path, metavar="FILE", help="the photograph for --checkpoint")
    options = parser.parse_args(arguments)
    if (options.checkpoint is None) != (options.image is None):
        parser.error("--checkpoint and --image must be given together")
    if options.checkpoint is not None:
        for name in ("study", "data", "epochs"):
            if getattr(options, name) is not None:
                parser.error(f"--{name} is of runs, not of --checkpoint")
        from sgalign.commands.mirror_figure import draw_mirror

        out = options.folder / f"mirror_{options.image.stem}.png"
        check_writable(out)
        draw_mirror(options.checkpoint, options.image, out)
        return 0
    studies.tabulate(options.folder, options.study, options.data, options.epochs)
    return 0
