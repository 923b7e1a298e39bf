"""The command line. Each command imports only what it needs."""

from __future__ import annotations

import argparse
import importlib
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """Runs a command; returns the exit code."""
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
        return _lightning([command, *rest])
    except Exception as error:
        if (sentence := _sentence(error)) is None:
            raise
        print(f"sgalign: {sentence}", file=sys.stderr)
        return 1


def _sentence(error: BaseException) -> str | None:
    """Return what an error of our own checks, the file system or Lightning says, or None if it is a defect."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, OSError | InputError) and "in DataLoader worker" in str(error):
        # torch raises it again, with the worker's traceback as its message
        return str(error).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, OSError | InputError | MisconfigurationException):
        return str(error)
    # jsonargparse raises an error of its own for what a constructor says.
    frames = traceback.extract_tb(error.__traceback__)
    by_parser = bool(frames) and "jsonargparse" in Path(frames[-1].filename).parts
    cause = error.__cause__ or error.__context__
    return _sentence(cause) if by_parser and cause is not None else None


def _lightning(arguments: list[str]) -> int:
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.utilities import rank_zero_info

    from sgalign.training import FrequencyModule, SavedModule, SceneGraphData, read_checkpoint

    class CLI(LightningCLI):
        checkpoint: dict[str, Any] | None = None

        def parse_arguments(self, parser: Any, args: Any) -> None:
            super().parse_arguments(parser, args)
            path = self.config[self.config.subcommand].get("ckpt_path")
            if path not in (None, "last", "hpc", "registry"):  # words that Lightning resolves
                # Before Lightning does, whose errors do not say what is wrong with the file.
                self.checkpoint = read_checkpoint(path)

        def before_fit(self) -> None:
            if isinstance(self.model, FrequencyModule):
                raise InputError("FrequencyModule has nothing to fit: sgalign test --model FrequencyModule is all")
            self._make_from_checkpoint()

        def _make_from_checkpoint(self) -> None:
            if self.checkpoint is not None:
                # It tells what is made, so that the files of initial values are not looked for again.
                self.model.on_load_checkpoint(self.checkpoint)
                self.checkpoint = None

        def _needs_checkpoint(self) -> None:
            if not isinstance(self.model, FrequencyModule) and not self.config[self.config.subcommand].ckpt_path:
                raise InputError(f"{self.config.subcommand} needs --ckpt_path FILE, a checkpoint that fit has written")
            self._make_from_checkpoint()

        def _parse_ckpt_path(self) -> None:
            """Options are those given: Lightning's would silently replace them, and the model, by the checkpoint's."""

        def after_fit(self) -> None:
            for callback in self.trainer.checkpoint_callbacks:
                if path := getattr(callback, "best_model_path", ""):
                    rank_zero_info(f"checkpoint {path}")

        before_validate = before_test = before_predict = _needs_checkpoint

    for expected in (
        "LightningCLI's args parameter",  # it is the command line that is passed on, without the command's name
        "Found .* module.* in eval mode",  # a detector that is not trained
        r"`isinstance\(treespec, LeafSpec\)`",  # between Lightning and torch
    ):
        warnings.filterwarnings("ignore", message=expected)
    cli = CLI(
        SavedModule,
        SceneGraphData,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )
    return 128 + signal.SIGTERM if cli.trainer.received_sigterm else 0  # which Lightning ends without an error for
