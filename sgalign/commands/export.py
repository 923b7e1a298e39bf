"""Write a trained model as a folder in the Hugging Face layout, with a model card, to share it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgalign.files import real_path
from sgalign.training import load_module, read_checkpoint
from sgalign.training.model_card import model_card, read_results
from sgalign.training.pretrained import without_paths, write_pretrained
from sgalign.training.resuming import differing

EPILOG = "docs/share_a_model.md describes the folder. A training run cannot resume from it, so keep the checkpoint."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign export", description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", help="checkpoint written by sgalign fit, or another model's folder")
    parser.add_argument("folder", type=Path, help="new or empty folder to write")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="figures for the model card: metrics.csv of sgalign test, or the JSON file of sgalign evaluate",
    )
    parser.add_argument("--license", metavar="ID", help="license of the weights for the model card, such as apache-2.0")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign export CHECKPOINT FOLDER` and return the exit code."""
    options = parser().parse_args(arguments)
    results = None if options.results is None else read_results(options.results)
    load_module(options.checkpoint)  # raises an error if the weights do not fit the options
    checkpoint = read_checkpoint(options.checkpoint)
    card = model_card(checkpoint, real_path(options.folder).name, results, options.license)
    write_pretrained(checkpoint, options.folder, card)
    size = sum(path.stat().st_size for path in options.folder.iterdir()) / 1e6
    print(
        f"wrote {options.folder}: {size:.1f} MB. Read the model card in {options.folder / 'README.md'} and add to it. "
        "Left out: the states of the optimizer, the schedules, the random generators and the loops, so no run can "
        "resume from the folder."
    )
    if paths := _reduced(checkpoint):
        print(f"reduced to the last part of a path: {', '.join(paths)}")
    return 0


def _reduced(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that `without_paths` changes."""
    kinds = {"model": checkpoint["hyper_parameters"], "data": checkpoint.get("datamodule_hyper_parameters", {})}
    return [f"{kind}.{name}" for kind, options in kinds.items() for name in differing(without_paths(options), options)]
