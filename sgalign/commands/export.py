"""Write a trained model as a folder in the Hugging Face layout, with a model card, to share it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sgalign.training import load_module, read_checkpoint
from sgalign.training.model_card import model_card, read_results
from sgalign.training.pretrained import write_pretrained

EPILOG = "docs/share_a_model.md describes the folder. A training run cannot resume from it, so keep the checkpoint."


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign export", description=__doc__, epilog=EPILOG)
    parser.add_argument("checkpoint", help="checkpoint written by sgalign fit")
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
    card = model_card(checkpoint, options.folder.resolve().name, results, options.license)
    write_pretrained(checkpoint, options.folder, card)
    size = sum(path.stat().st_size for path in options.folder.iterdir()) / 1e6
    print(
        f"wrote {options.folder}: {size:.1f} MB. Read the model card in {options.folder / 'README.md'} and add to it."
    )
    return 0
