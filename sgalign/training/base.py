"""The base of all Lightning modules: a network made for the data's classes, and checkpoints that carry their names."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import Self

from sgalign.data import GraphBatch
from sgalign.data.transfer import HostCopy
from sgalign.errors import InputError
from sgalign.models import predicate_counts
from sgalign.training.checkpoints import (
    WholeCheckpointIO,
    check_ours,
    not_finite,
    random_states,
    read_checkpoint,
    restore_random_states,
    some_of,
)
from sgalign.training.datamodule import SceneGraphData
from sgalign.training.options import Options
from sgalign.training.resuming import GivenOptions
from sgalign.training.seeds import step_seed


class _Report(NamedTuple):
    """Numbers that a step logs, on their way to the host."""

    names: tuple[str, ...]
    values: HostCopy  # of the loss, over all processes, and of each name
    shown: frozenset[str]


class SavedModule(pl.LightningModule):
    """A module whose network is made for the data's classes, and whose checkpoints carry their names.

    Subclasses say how the network is made from the training part (`make_network`), and how it is trained.

    Args:
        options: checked ones, which are saved as hyperparameters.
    """

    options_type: type[Options] = Options  # of `options`: tells which of a checkpoint's options are this class's

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.save_hyperparameters(dataclasses.asdict(options))
        self.network: nn.Module | None = None
        self.object_names: list[str] = []
        self.predicate_names: list[str] = []
        self.run_seed = 0
        self.random_states: list[Tensor] = []  # of the checkpoint that a run resumes from
        self.options_before: dict[str, Any] | None = None  # `GivenOptions.saved` of the same checkpoint
        self.given: GivenOptions | None = None
        self.image_ids: Sequence[Any] = []  # of the step's images
        self._report: _Report | None = None

    def make_network(self, counts: Tensor) -> None:
        """Set `self.network`, and modules beside it, for the classes that `predicate_counts` tells of."""
        raise NotImplementedError(f"{type(self).__name__} must override make_network")

    @property
    def data(self) -> SceneGraphData:
        """Return the data that the trainer reads."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def learns_from_targets(self) -> bool:
        """Return True if training reads `GraphBatch.targets`, the predicates of annotated pairs."""
        return False

    @property
    def part(self) -> str:
        """Return the part of the data that is evaluated, as logged names begin: "test" or "val"."""
        return "test" if self.trainer.testing else "val"

    @property
    def processes(self) -> int:
        """Return the number of processes that train together."""
        return 1 if self._trainer is None else self.trainer.world_size

    # ---- a run

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        data = self.data
        if stage == "fit" and data.instance_drop and not self.learns_from_targets:
            raise InputError(
                f"instance_drop must be 0 for {type(self).__name__} with these options, which does not learn from the "
                f"annotated pairs' labels, got {data.instance_drop}"
            )
        self._set_classes(data.object_names, data.predicate_names, f"the data, {data.name},")
        if self.network is None:
            self.make_network(predicate_counts(data.train, len(self.object_names) - 1, len(self.predicate_names) - 1))
            if stage == "fit" and not self.trainer.ckpt_path:
                self.load_initial_weights()

    def load_initial_weights(self) -> None:
        """Load what training starts from into a new network, where options name a file of it."""

    def on_fit_start(self) -> None:
        self.given = GivenOptions(self.trainer.optimizers, self._schedules)
        if not self.trainer.ckpt_path:
            self.run_seed = torch.initial_seed()

    @property
    def _schedules(self) -> list[Any]:
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path and self.options_before is not None:
            assert self.given is not None
            for sentence in self.given.put_back(self.trainer.optimizers, self._schedules, self.options_before):
                rank_zero_info(sentence)
        # Dropout and the detector's sampling resume from them. Of several processes only one has saved its states.
        if self.trainer.ckpt_path and self.processes == 1:
            restore_random_states(self.random_states)

    def step_seed(self, batch_index: int, *, purpose: str = "mask") -> int:
        """Return the seed of what this step draws: it repeats in a resumed run and differs between ranks."""
        return step_seed(self.run_seed, self.global_step, batch_index, self.global_rank, purpose=purpose)

    def on_train_batch_start(self, batch: GraphBatch, batch_index: int) -> None:
        self.image_ids = batch.image_ids

    def report(self, loss: Tensor, parts: Mapping[str, Tensor], *, shown: Collection[str]) -> Tensor:
        """Return the loss of a step, whose parts are logged; where it is not finite an error names them.

        The host reads them when the gradients are queued, so that a GPU computes meanwhile, and before the optimizer's
        step. A progress bar would have it wait for all that is queued.

        Args:
            loss: what is minimised.
            parts: what is logged, numbers by name.
            shown: names of the parts that the progress bar shows.
        """
        numbers = HostCopy(torch.stack([self.over_processes(loss), *parts.values()]))
        self._report = _Report(tuple(parts), numbers, frozenset(shown))
        return loss

    def over_processes(self, number: Tensor) -> Tensor:
        """Return the sum of a number over all processes; it is not finite where it is not in one of them."""
        if self.processes == 1:
            return number
        total = number.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Queue the gradients; then check and log what `report` was given, which the device has sent meanwhile."""
        super().backward(loss, *args, **kwargs)
        if self._report is None:
            return
        (names, copy, shown), self._report = self._report, None
        total, *values = copy.read()
        parts = dict(zip(names, values, strict=True))
        self.check_finite(total, parts)
        for name, part in parts.items():
            self.log(f"train/{name}", part, batch_size=len(self.image_ids), prog_bar=name in shown)

    def check_finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Raise an error that says what a loss on the host is made of, unless it is finite.

        Where weights are not finite, because the gradients of the step before were not, it names these.

        Args:
            loss: over all processes, so that they stop together: one that stopped alone would leave the others waiting.
            parts: of this process.
        """
        if loss.isfinite():
            return
        # Buffers may come from this step: batch normalisation keeps the mean of what it sees.
        check_weights(dict(self.named_parameters()), self.global_step)
        if self.processes > 1 and all(part.isfinite() for part in parts.values()):
            raise InputError(f"the loss must be finite, that of another process is not at step {self.global_step}")
        values = ", ".join(f"{name} {part.item():.3g}" for name, part in parts.items())
        remedy = f"look at the data of images {some_of(self.image_ids) or 'of this step'}"
        if self.global_step:
            remedy = f"lower learning_rate, or {remedy}"
        raise InputError(
            f"the loss must be finite, got {loss.item():.3g} of {values} at step {self.global_step}: {remedy}"
        )

    def on_validation_start(self) -> None:
        check_weights(self.state_dict(), self.global_step)

    on_test_start = on_predict_start = on_validation_start

    def test_step(self, batch: GraphBatch) -> None:
        self.validation_step(batch)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if sys.exc_info()[0] is None:  # or Lightning would not end what the first error stopped
            check_weights(checkpoint["state_dict"], self.global_step)
        checkpoint["sgalign"] = {
            "object_names": self.object_names,
            "predicate_names": self.predicate_names,
            "run_seed": self.run_seed,
            "random_states": random_states(),
            "optimization": self.given.saved() if self.given is not None else None,
            "module": type(self).__name__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_kind(checkpoint)
        saved = checkpoint["sgalign"]
        self._set_classes(saved["object_names"], saved["predicate_names"], "the checkpoint")
        self.run_seed, self.random_states = saved["run_seed"], saved["random_states"]
        self.options_before = saved.get("optimization")
        if self.network is None:
            classes, predicates = len(self.object_names), len(self.predicate_names)
            self.make_network(torch.ones(classes, classes, predicates))  # the weights follow
        self._leave_out_mirror(checkpoint["state_dict"])
        self._check_weights(checkpoint["state_dict"])

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        **options: Any,
    ) -> Self:
        """Return the module of a checkpoint.

        A module without a mirror can be made of the checkpoint of one with a mirror, whose options and weights are left
        out; Lightning's own method would hand it options that it does not know.

        Args:
            map_location: the device that the module is moved to.
            options: take the place of the checkpoint's.

        Raises:
            FileNotFoundError, ValueError: as `read_checkpoint`, or the checkpoint is of another module.
        """
        return cls._of_checkpoint(read_checkpoint(checkpoint_path), **options).to(map_location)

    @classmethod
    def _of_checkpoint(cls, checkpoint: dict[str, Any], **options: Any) -> Self:
        """Return the module of a checkpoint that has been read; weights that do not fit the module are taken out."""
        cls._check_kind(checkpoint)
        known = {field.name for field in dataclasses.fields(cls.options_type)}
        saved = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
        module = cls(**(saved | options))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return module

    @classmethod
    def _check_kind(cls, checkpoint: dict[str, Any]) -> None:
        check_ours(checkpoint, "checkpoint")
        name = checkpoint["sgalign"]["module"]
        # Motifs or SGTR may be made of what has a mirror.
        kind = cls if name == cls.__name__ else module_named(name)
        if kind is None or not issubclass(kind, cls):
            raise InputError(f"checkpoint must be of {cls.__name__}, as asked for, is of {name}")

    def _set_classes(self, object_names: Sequence[str], predicate_names: Sequence[str], whose: str) -> None:
        if self.network is None:
            self.object_names, self.predicate_names = list(object_names), list(predicate_names)
        for kind, ours, theirs in (
            ("object", self.object_names, object_names),
            ("predicate", self.predicate_names, predicate_names),
        ):
            if ours != list(theirs):
                differ = sorted(set(ours) ^ set(theirs))[:3] or "their order"
                raise InputError(
                    f"{kind} classes of the model and of {whose} must be the same; they differ in {differ}"
                )

    def _leave_out_mirror(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a mirror that this module does not have out of those that are to be loaded."""
        of_model = self.state_dict()
        mirror = [name for name in weights if name.startswith("mirrored_") and name not in of_model]
        if mirror and self._trainer is not None and self.trainer.training:
            raise InputError(f"checkpoint has a mirror: {type(self).__name__} can be tested with it, not go on from it")
        for name in mirror:
            del weights[name]

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise an error unless the weights are finite, and those that this module has, of the same shapes."""
        of_model = self.state_dict()
        for name, own in of_model.items():
            if name in weights and weights[name].shape != own.shape:
                shapes = f"{name} is {list(weights[name].shape)}, not {list(own.shape)}"
                raise InputError(f"checkpoint must be of a model with the same options: {shapes}")
        if differing := sorted(of_model.keys() ^ weights.keys()):
            what = f"{'lacks' if differing[0] in of_model else 'has'} {differing[0]}"
            raise InputError(f"checkpoint must be of {type(self).__name__} with the same parts, {what}")
        if names := not_finite(weights):
            raise InputError(f"checkpoint must have finite weights, these are not: {some_of(names)}")


def check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Raise an error that names those of the weights that are not finite, if there are any."""
    if names := not_finite(weights):
        remedy = ". Lower learning_rate, and go on from an earlier checkpoint" if step else ""
        raise InputError(f"weights must be finite; at step {step} these are not: {some_of(names)}{remedy}")


def module_named(name: str) -> type[SavedModule] | None:
    """Return the class of that name among all that have been imported."""
    kinds: list[type[SavedModule]] = [SavedModule]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == name), None)


def load_module(path: str | Path) -> SavedModule:
    """Return the module of a checkpoint, in evaluation mode on the CPU.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path)
    name = checkpoint["sgalign"]["module"]
    kind = module_named(name)
    if kind is None:
        raise InputError(f"{path}: must be of a module of this package, got {name!r}")
    return kind._of_checkpoint(checkpoint).eval()


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Any]]:
    """Return the scheduler by which the learning rate grows from a tenth over so many steps; none for 0 steps."""
    if not steps:
        return []
    return [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), "interval": "step"}]
