"""The entry of the command line: chooses the command, which imports only what it needs, and says what went wrong."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from sgalign.errors import InputError

USAGE = """\
usage: sgalign COMMAND ...

  doctor    what is installed, what runs, what to do about the rest
  compare   train and evaluate the frequency baseline, Motifs and Align-Motifs
  ablate    train variants of Motifs with several seeds each: the paper's tables
  report    tables and figures of what ablate has done
  make-dataset
            generated scenes as files, or a data set as COCO with relations
  cache-features
            what a model's detector and extractors see of a data set, for fast training
  evaluate  any system's predictions, from a file
  predict   the scene graphs of an image or of a folder of images, with a trained model
  fit, validate, test, predict --config FILE
            one system on a data set: sgalign fit --config configs/align_motifs_small.yaml

sgalign COMMAND --help has each command's options."""

COMMANDS = ("ablate", "cache-features", "compare", "evaluate", "make-dataset", "report")
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
LIGHTNING_OPTIONS = {"-c", "--config", "--model", "--data", "--trainer", "--ckpt_path"}  # not of predict on photographs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 1 after a sentence on stderr, 2 where there is no such command."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from sgalign import __version__

        print(__version__)
        return 0
    if command not in ("doctor", *COMMANDS, *TRAINER_COMMANDS):
        print(f"sgalign: no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from sgalign.commands import doctor

    if command == "doctor":
        argparse.ArgumentParser("sgalign doctor", description=doctor.__doc__).parse_args(rest)
        return doctor.main()
    if missing := doctor.missing("train"):
        print(f"sgalign: {command} cannot run, {missing[0]}", file=sys.stderr)
        return 1
    try:
        photographs = LIGHTNING_OPTIONS.isdisjoint(re.split("[.+=]", option)[0] for option in rest)
        if command in COMMANDS or (command == "predict" and photographs):
            return importlib.import_module(f"sgalign.commands.{command.replace('-', '_')}").main(rest)
        from sgalign.commands import lightning_cli

        return lightning_cli.main([command, *rest])
    except ModuleNotFoundError as error:  # where sgalign is not installed, nothing lists what the extra needs
        package = (error.name or "sgalign").partition(".")[0]
        if package == "sgalign":
            raise
        print(f"sgalign: {command} needs {package}: pip install 'sgalign[train]'", file=sys.stderr)
        return 1
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        print(f"sgalign: {sentence}", file=sys.stderr)
        return 1


def _sentence(error: BaseException) -> str | None:
    """Return what an error of our own checks, the file system or Lightning says, or None if it is a defect."""
    if isinstance(error, OSError | InputError) and "in DataLoader worker" in str(error):
        # torch raises it again, with the worker's traceback as its message
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, OSError | InputError) or _is_lightnings(error):
        return str(error)
    # jsonargparse raises an error of its own for what a constructor says.
    frames = traceback.extract_tb(error.__traceback__)
    by_parser = bool(frames) and "jsonargparse" in Path(frames[-1].filename).parts
    cause = error.__cause__ or error.__context__
    return _sentence(cause) if by_parser and cause is not None else None


def _is_lightnings(error: BaseException) -> bool:
    """Return True for Lightning's error about options. Where Lightning was not imported, it cannot have raised one."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return exceptions is not None and isinstance(error, exceptions.MisconfigurationException)
