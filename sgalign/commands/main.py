"""The entry point of the command line.

It imports only the modules that the chosen command needs, and prints an error in the user's input as one sentence.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

from sgalign.errors import InputError, is_lack_of_memory, modules_of, packages_of

USAGE = """\
usage: sgalign COMMAND ...

  doctor    show which packages are installed and which backends run, and how to enable the other backends
  compare   train and evaluate the frequency baseline, Motifs and Align-Motifs
  ablate    train the arms of studies with several seeds each, for the paper's tables: sgalign ablate STUDY.yaml
  report    make tables and figures from the runs of ablate
  make-dataset
            write generated scenes as files, or convert a data set to COCO with relations
  cache-features
            store the features that a model computes from the images of a data set, for fast training
  check     list the faults of a data set, all at once
  export    write a trained model as a folder in the Hugging Face layout, with a model card
  evaluate  score any system's predictions, read from a file
  predict   predict the scene graphs of images with a trained model
  view      write a page that shows predicted scene graphs, or those of a data set, in a browser
  fit, validate, test, predict --config FILE
            train or run one system: sgalign fit --config configs/align_motifs_small.yaml

sgalign COMMAND --help shows the options of a command."""

COMMANDS = ("ablate", "cache-features", "check", "compare", "evaluate", "export", "make-dataset", "report", "view")
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
# `predict` with one of these options is Lightning's. Without them it is `predict` on image files.
LIGHTNING_OPTIONS = {"-c", "--config", "--model", "--data", "--trainer", "--ckpt_path"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    The code is 1 if the command failed, 2 if there is no such command, and 143 if SIGTERM ended a training command.
    Wrong options end the program with the code 2.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        from sgalign import __version__

        print(__version__)
        return 0
    if command not in ("doctor", *COMMANDS, *TRAINER_COMMANDS):
        print(f"sgalign: there is no command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    from sgalign.commands import doctor

    if command == "doctor":
        argparse.ArgumentParser("sgalign doctor", description=doctor.__doc__).parse_args(rest)
        return doctor.main()
    if missing := doctor.missing("train"):
        print(f"sgalign: {command} needs packages that are {missing[0]}", file=sys.stderr)
        return 1
    try:
        photographs = LIGHTNING_OPTIONS.isdisjoint(re.split("[.+=]", option)[0] for option in rest)
        if command in COMMANDS or (command == "predict" and photographs):
            return importlib.import_module(f"sgalign.commands.{command.replace('-', '_')}").main(rest)
        from sgalign.training import lightning_cli

        return lightning_cli.main([command, *rest])
    except ModuleNotFoundError as error:  # `doctor.missing` finds nothing in a source tree that is not installed
        package = (error.name or "sgalign").partition(".")[0]
        if package == "sgalign":
            raise
        print(f"sgalign: {command} needs {package}: pip install 'sgalign[train]'", file=sys.stderr)
        return 1
    except BrokenPipeError:
        raise
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        print(f"sgalign: {sentence}", file=sys.stderr)
        return 1


RESTORING = "lightning.pytorch.trainer.connectors.checkpoint_connector"  # Lightning's module that loads states


def _sentence(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix, or None for a bug.

    Errors that the user can fix come from our checks, the file system, Lightning or the lack of memory.
    """
    if isinstance(error, OSError | InputError) and "in DataLoader worker" in str(error):
        # torch raises a worker's error again, with the worker's traceback as its message.
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if is_lack_of_memory(error):
        size = re.search(r"allocate ([\d.]+ \w+)", str(error))
        wanted = f" for {size[1]}" if size else ""
        return f"not enough memory{wanted}: free memory, or use smaller batches, images or layers"
    if isinstance(error, OSError | InputError) or _is_lightnings(error):
        return str(error)
    if RESTORING in modules_of(error) and packages_of(error)[-1] != "sgalign":
        return f"ckpt_path must have the states of this run, but loading them failed ({type(error).__name__}: {error})"
    # jsonargparse replaces the error that a constructor raises with its own.
    by_parser = packages_of(error)[-1:] == ["jsonargparse"]
    cause = error.__cause__ or error.__context__
    return _sentence(cause) if by_parser and cause is not None else None


def _is_lightnings(error: BaseException) -> bool:
    """Return True if this is Lightning's error about options, without importing Lightning.

    Lightning also raises ValueError, OverflowError and, in EarlyStopping, RuntimeError for wrong options.
    """
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    if exceptions is None:
        return False
    if isinstance(error, exceptions.MisconfigurationException):
        return True
    if isinstance(error, RuntimeError) and "Early stopping conditioned on metric" in str(error):
        return True  # nothing has logged this figure
    return isinstance(error, ValueError | OverflowError) and packages_of(error)[-1:] == ["lightning"]
