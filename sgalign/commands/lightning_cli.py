"""`sgalign fit`, `validate`, `test` and `predict --config`: Lightning's command line with our modules and data."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from sgalign.errors import InputError
from sgalign.training import FrequencyModule, SavedModule, SceneGraphData, read_checkpoint

EXPECTED_WARNINGS = (
    "LightningCLI's args parameter",  # it is the command line that is passed on, without the command's name
    "Found .* module.* in eval mode",  # a detector that is not trained
    r"`isinstance\(treespec, LeafSpec\)`",  # between Lightning and torch
)


class CLI(LightningCLI):
    """Lightning's command line, where options are those given and a checkpoint tells the weights alone."""

    checkpoint: dict[str, Any] | None = None

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, and read the checkpoint before anything is made."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path not in (None, "last", "hpc", "registry"):  # words that Lightning resolves
            # Before Lightning does, whose errors do not say what is wrong with the file.
            self.checkpoint = read_checkpoint(path)

    def before_fit(self) -> None:
        """Refuse to train what has nothing to train."""
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
        """Do nothing: Lightning's method would silently replace given options, and the model, by the checkpoint's."""

    def after_fit(self) -> None:
        """Print where the checkpoints are."""
        for callback in self.trainer.checkpoint_callbacks:
            if path := getattr(callback, "best_model_path", ""):
                rank_zero_info(f"checkpoint {path}")

    before_validate = before_test = before_predict = _needs_checkpoint


def main(arguments: Sequence[str]) -> int:
    """Run `fit`, `validate`, `test` or `predict`, the first of the arguments; return the exit code."""
    for expected in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=expected)
    cli = CLI(
        SavedModule,
        SceneGraphData,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        args=list(arguments),
    )
    return 128 + signal.SIGTERM if cli.trainer.received_sigterm else 0  # which Lightning ends without an error for
