"""Tables and figures of `sgalign ablate`'s runs: what settings reach, and which differences are more than noise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgalign.commands import studies
from sgalign.files import check_writable


def main(arguments: Sequence[str]) -> int:
    """`sgalign report FOLDER`."""
    parser = argparse.ArgumentParser("sgalign report", description=__doc__)
    parser.add_argument("folder", type=Path, help="that sgalign ablate has written, or for a figure")
    parser.add_argument(
        "--study", nargs="+", choices=studies.STUDIES, metavar="STUDY", help="(default: those with a run of every row)"
    )
    parser.add_argument("--data", metavar="NAME", help="of the runs' settings, if there are several")
    parser.add_argument("--epochs", type=int, metavar="N", help="of the runs, if there are several numbers")
    parser.add_argument("--checkpoint", help="of Align-SGTR: draws what it attends to in --image instead")
    parser.add_argument("--image", type=Path, help="a photograph")
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
