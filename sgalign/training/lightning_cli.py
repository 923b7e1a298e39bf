"""Lightning's command line for our modules and data: `sgalign fit`, `validate`, `test` and `predict --config`."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sgalign.errors import InputError
from sgalign.files import full_disk_named
from sgalign.training.base import SavedModule
from sgalign.training.checkpoints import read_checkpoint
from sgalign.training.datamodule import SceneGraphData
from sgalign.training.frequency import FrequencyModule
from sgalign.training.saved_states import check_resumable

EXPECTED_WARNINGS = (
    "Total length of `DataLoader` across ranks is zero",  # a validation split without relations, which we name
    "LightningCLI's args parameter",  # our `args` are the command line without the name of the program
    "Found .* module.* in eval mode",  # a frozen detector stays in evaluation mode
    r"`isinstance\(treespec, LeafSpec\)`",  # Lightning's use of torch is deprecated
)


class CLI(LightningCLI):
    """Lightning's command line. Options come from the config and the arguments, never from a checkpoint."""

    checkpoint: dict[str, Any] | None = None

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.set_defaults({"data": "sgalign.training.SceneGraphData"})  # --data CLASS chooses another class

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the arguments, and read the checkpoint before any object is made."""
        super().parse_arguments(parser, args)
        seed = self.config[self.config.subcommand].get("seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 1 << 32:
            raise InputError(f"seed_everything must be from 0 to 2^32 - 1, got {seed}")
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path not in (None, "last", "hpc", "registry"):  # fit resolves "last", and Lightning the others
            self._read(path)

    def _read(self, path: str) -> None:
        # Read it before Lightning does, because Lightning's errors do not say what is wrong with the file.
        self.checkpoint = read_checkpoint(path)
        if self.config.subcommand == "fit":
            check_resumable(self.checkpoint)
        self._check_seed(self.checkpoint["sgalign"]["run_seed"])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the trainer. Raise InputError if Lightning refuses its options."""
        try:
            return super().instantiate_trainer(**kwargs)
        except InputError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"trainer: Lightning refuses its options: {error}") from error

    def _find_last(self) -> None:
        """Replace the word "last" by the path of the newest last checkpoint in the `dirpath` of the callbacks.

        If there is none, the word stays, and Lightning starts a new run with a warning.
        """
        options = self.config_init[self.subcommand]
        if options.ckpt_path != "last":
            return
        folders = {getattr(callback, "dirpath", None) for callback in self.trainer.checkpoint_callbacks}
        if paths := [path for folder in folders if folder is not None for path in Path(folder).glob("last*.ckpt")]:
            options.ckpt_path = str(max(paths, key=lambda path: path.stat().st_mtime))
            self._read(options.ckpt_path)

    def _check_seed(self, saved: int) -> None:
        """Raise InputError if a resumed run is given another seed than the checkpoint's, which it keeps."""
        seed = self.config[self.config.subcommand].get("seed_everything")
        given = not isinstance(seed, bool | None)  # True asks for a random seed, and a resumed run keeps its own
        if self.config.subcommand == "fit" and given and seed != saved:
            raise InputError(f"seed_everything must be {saved}, as in the checkpoint, got {seed}")

    def before_fit(self) -> None:
        """Raise InputError if the model has nothing to train, otherwise prepare it for the checkpoint."""
        if isinstance(self.model, FrequencyModule):
            raise InputError("FrequencyModule has nothing to fit: sgalign test --model FrequencyModule evaluates it")
        self._find_last()
        self._make_from_checkpoint()

    def _make_from_checkpoint(self) -> None:
        if self.checkpoint is not None:
            # This makes the network from the checkpoint, so the files with initial weights (`detector_weights`,
            # `word_vectors`) are not read.
            self.model.on_load_checkpoint(self.checkpoint)
            self.checkpoint = None

    def _needs_checkpoint(self) -> None:
        if not isinstance(self.model, FrequencyModule) and not self.config[self.config.subcommand].ckpt_path:
            raise InputError(f"{self.config.subcommand} needs --ckpt_path FILE, a checkpoint written by fit")
        limit = f"limit_{'val' if self.subcommand == 'validate' else self.subcommand}_batches"
        if not getattr(self.trainer, limit):
            raise InputError(f"trainer.{limit} must be above 0, or there is nothing to {self.subcommand}, got 0")
        self._make_from_checkpoint()

    def _parse_ckpt_path(self) -> None:
        """Do nothing.

        Lightning's method would silently take the model and its options from the checkpoint, not the command line.
        """

    def _run_subcommand(self, subcommand: str) -> None:
        folders = [logger.save_dir for logger in self.trainer.loggers if logger.save_dir]
        with full_disk_named([*folders, self.trainer.default_root_dir][0]):  # loggers do not name their files
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Print the paths of the checkpoints."""
        for callback in self.trainer.checkpoint_callbacks:
            path = getattr(callback, "best_model_path", "")
            # A resumed callback that has saved nothing yet still has the path of the first run.
            if path and Path(path).parent == Path(getattr(callback, "dirpath", None) or ""):
                rank_zero_info(f"checkpoint {path}")

    before_validate = before_test = before_predict = _needs_checkpoint


def make_cli(arguments: Sequence[str], kind: type[CLI] = CLI, **options: Any) -> CLI:
    """Return the command line after it has run the command that the first argument names.

    Args:
        arguments: the arguments.
        kind: class of the command line.
        options: further arguments of `LightningCLI`.
    """
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    return kind(
        SavedModule,
        SceneGraphData,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the modules make their optimizers from their own options
        save_config_kwargs={"overwrite": True},
        args=list(arguments),
        **options,
    )


def main(arguments: Sequence[str]) -> int:
    """Run the command that the first argument names (fit, validate, test or predict), and return the exit code."""
    try:
        ended = make_cli(arguments).trainer.received_sigterm
    except SIGTERMException:  # a SystemExit without a code, so the process would end as if all had gone well
        ended = True
    return 128 + signal.SIGTERM if ended else 0
