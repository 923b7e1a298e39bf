"""The base class of all Lightning modules. It builds the network for the data's classes and handles checkpoints."""

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
from sgalign.errors import InputError, is_lack_of_memory
from sgalign.files import real_path
from sgalign.models import predicate_counts
from sgalign.ops.seeds import step_seed
from sgalign.training.checkpoints import (
    WholeCheckpointIO,
    check_ours,
    check_same_weights,
    check_weights,
    only_shapes,
    random_states,
    read_checkpoint,
    restore_random_states,
    some_of,
)
from sgalign.training.datamodule import SceneGraphData
from sgalign.training.model_card import model_card
from sgalign.training.options import Options
from sgalign.training.pretrained import training_of, write_pretrained
from sgalign.training.resuming import GivenOptions, check_fixed, continue_epoch, differing
from sgalign.training.saved_states import (
    check_callbacks,
    check_optimizers,
    check_resumable,
    check_same_step,
    check_states,
)


class _Report(NamedTuple):
    """The numbers that a step logs, while they are copied to the host."""

    names: tuple[str, ...]
    values: HostCopy  # the loss summed over all processes, then one number per name
    shown: frozenset[str]  # names that the progress bar shows


class SavedModule(pl.LightningModule):
    """A Lightning module whose network depends on the data's classes, and whose checkpoints contain their names.

    Subclasses build the network from statistics of the training split (`make_network`) and define how it is trained.

    Args:
        options: the validated options. They are saved as hyperparameters.
    """

    options_type: type[Options] = Options  # a checkpoint's options that this type lacks are ignored
    needs_relations = True  # False for detectors, which also train on images without relations

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.save_hyperparameters(dataclasses.asdict(options))
        self.network: nn.Module | None = None
        self.object_names: list[str] = []
        self.predicate_names: list[str] = []
        self.run_seed = 0
        self.resumed: dict[str, Any] | None = None  # checkpoint that the run resumes from, until it starts
        self.loaded_step = -1  # step of that checkpoint
        self.random_states: list[Tensor] = []  # generator states in that checkpoint
        self.max_steps = -1  # the trainer's limit while it is hidden from Lightning
        self.differences: dict[str, tuple[Any, Any]] = {}  # options that differ from that checkpoint, and both values
        self.given: GivenOptions | None = None
        self.image_ids: Sequence[Any] = []  # ids of the images in this step
        self.origin: dict[str, Any] = {}  # of loaded weights: their step and the result of `training_of`
        self._report: _Report | None = None

    def make_network(self, counts: Tensor) -> None:
        """Set `self.network` and related modules.

        Args:
            counts: result of `predicate_counts`. Its shape gives the numbers of classes.
        """
        raise NotImplementedError(f"{type(self).__name__} must override make_network")

    @property
    def data(self) -> SceneGraphData:
        """The data module of the trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def learns_from_targets(self) -> bool:
        """True if training reads `GraphBatch.targets`, the predicates of annotated pairs."""
        return False

    @property
    def overlapping_only(self) -> bool:
        """True if training leaves out relations between boxes that do not overlap. The data's option overrides it."""
        return False

    @property
    def part(self) -> str:
        """The evaluated split, "test" or "val". Logged names begin with it."""
        return "test" if self.trainer.testing else "val"

    @property
    def processes(self) -> int:
        """The number of processes that train together."""
        return 1 if self._trainer is None else self.trainer.world_size

    # ---- a run

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = WholeCheckpointIO()
        data = self.data
        data.prepare_for(relations=self.needs_relations, overlapping_only=self.overlapping_only)
        if stage == "fit" and data.instance_drop and not self.learns_from_targets:
            raise InputError(
                f"instance_drop must be 0 for {type(self).__name__} with these options, got {data.instance_drop}: "
                "training does not use the labels of annotated pairs, which instance_drop removes"
            )
        self._set_classes(data.object_names, data.predicate_names, str(data.name))
        if self.network is None:
            self.make_network(self.training_counts())
            if stage == "fit" and not self.trainer.ckpt_path:
                self.load_initial_weights()

    def training_counts(self) -> Tensor:
        """Return `predicate_counts` of the training split."""
        return predicate_counts(self.data.train, len(self.object_names) - 1, len(self.predicate_names) - 1)

    def load_initial_weights(self) -> None:
        """Load pretrained weights into a new network, if the options name a source of weights."""

    def on_fit_start(self) -> None:
        if self.processes > 1:
            check_same_step(self.loaded_step if self.trainer.ckpt_path else -1, self.trainer)
        self.given = GivenOptions(self.trainer.optimizers, self._schedules)
        resumed, self.resumed = self.resumed, None
        self.max_steps = -1
        if resumed is not None and self.trainer.ckpt_path:
            check_states(resumed, self.trainer)
            continue_epoch(resumed)
            # With max_steps, Lightning would end a complete epoch once more, and leave out the data of the next one.
            if self.loaded_step < (loop := self.trainer.fit_loop.epoch_loop).max_steps:
                self.max_steps, loop.max_steps = loop.max_steps, -1
        if not self.trainer.ckpt_path:
            self.run_seed = torch.initial_seed()

    @property
    def _schedules(self) -> list[Any]:
        return [config.scheduler for config in self.trainer.lr_scheduler_configs]

    def _show_max_steps(self) -> None:
        if self.max_steps != -1:
            self.trainer.fit_loop.epoch_loop.max_steps, self.max_steps = self.max_steps, -1

    on_fit_end = _show_max_steps  # for a run that has nothing left to train

    def on_train_start(self) -> None:
        self._show_max_steps()
        if self.trainer.ckpt_path:
            assert self.given is not None
            check_optimizers(self.trainer.optimizers, self.loaded_step)
            rates = self.given.put_back(self.trainer.optimizers, self._schedules)
            changed = [f"{name} {now} instead of {then}" for name, (now, then) in self.differences.items()]
            if self.differences.keys().isdisjoint(("learning_rate", "backbone_learning_rate")):
                changed += [f"initial learning rate {rate}" for rate in rates]  # it depends on the batch size
            if changed:
                rank_zero_info(f"these options differ from the checkpoint: {', '.join(changed)}")
        # Dropout and the detector's sampling continue from these states. Only one process saves its states, so a run
        # of several processes cannot restore them.
        if self.trainer.ckpt_path and self.processes == 1:
            restore_random_states(self.random_states)

    def step_seed(self, batch_index: int, *, purpose: str = "mask") -> int:
        """Return the seed of this step's random draws. It differs between ranks and is the same in a resumed run."""
        return step_seed(self.run_seed, self.global_step, batch_index, self.global_rank, purpose=purpose)

    def on_train_batch_start(self, batch: GraphBatch, batch_index: int) -> None:
        self.image_ids = batch.image_ids

    def report(self, loss: Tensor, parts: Mapping[str, Tensor], *, shown: Collection[str]) -> Tensor:
        """Start copying a step's loss and its parts to the host, and return the loss.

        `backward` then logs the parts. If the loss is not finite, it raises an error that lists them. It reads the
        numbers after it has queued the gradients and before the optimizer's step, so a GPU computes while the host
        waits. The logged numbers are on the host. If they were on the device, the progress bar would make the host wait
        for all queued work.

        Args:
            loss: the number to minimize.
            parts: the numbers to log, by name.
            shown: names of the parts that the progress bar shows.
        """
        numbers = HostCopy(torch.stack([self.over_processes(loss), *parts.values()]))
        self._report = _Report(tuple(parts), numbers, frozenset(shown))
        return loss

    def log_share(self, name: str, found: Tensor, **options: Any) -> None:
        """Log the mean of `found` (`[N]`) over all images of the evaluated split.

        A process without elements still logs in a run of several processes, because the others wait for its number.
        """
        if len(found) or self.processes > 1:
            mean = found.mean() if len(found) else torch.zeros((), device=self.device)
            # Lightning divides the sum of the processes' batch sizes by their number, and drops the remainder.
            size = len(found) * self.processes
            self.log(f"{self.part}/{name}", mean, batch_size=size, sync_dist=True, on_epoch=True, **options)

    def over_processes(self, number: Tensor) -> Tensor:
        """Return the sum of a number over all processes. It is not finite if any process's number is not finite."""
        if self.processes == 1:
            return number
        total = number.detach().clone()
        torch.distributed.all_reduce(total)
        return total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Queue the gradients, then check and log the numbers that `report` has copied to the host."""
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
        """Raise InputError unless the loss is finite. The error lists the parts of the loss.

        If weights are not finite, the error names the weights instead. Gradients of the previous step that were not
        finite have this effect. All numbers must be on the host.

        Args:
            loss: the sum of the loss over all processes. All processes see the same sum, so they stop together. If one
                stopped alone, the others would wait for it.
            parts: the parts of this process's loss, by name.
        """
        if loss.isfinite():
            return
        # Buffers are not checked, because this step may have changed them: batch normalization updates its means.
        check_weights(dict(self.named_parameters()), self.global_step)
        if self.processes > 1 and all(part.isfinite() for part in parts.values()):
            raise InputError(
                f"the loss must be finite, but the loss of another process was not finite at step {self.global_step}"
            )
        values = ", ".join(f"{name} {part.item():.3g}" for name, part in parts.items())
        remedy = f"check the data of this step's images ({some_of(self.image_ids) or 'names unknown'})"
        if self.global_step:
            remedy = f"lower learning_rate, or {remedy}"
        raise InputError(
            f"the loss must be finite, got {loss.item():.3g} ({values}) at step {self.global_step}: {remedy}"
        )

    def on_validation_start(self) -> None:
        check_weights(self.state_dict(), self.global_step)

    on_test_start = on_predict_start = on_validation_start

    def validation_step(self, batch: GraphBatch) -> dict[str, Any] | None:
        """Evaluate a batch. A relation model returns its `predictions`."""
        raise NotImplementedError(f"{type(self).__name__} must override validation_step")

    def test_step(self, batch: GraphBatch) -> dict[str, Any] | None:
        return self.validation_step(batch)

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if sys.exc_info()[0] is None:  # a second error would keep Lightning from ending the run after the first
            check_weights(checkpoint["state_dict"], self.global_step)
        checkpoint["sgalign"] = {
            "object_names": self.object_names,
            "predicate_names": self.predicate_names,
            "run_seed": self.run_seed,
            "random_states": random_states(),
            "module": type(self).__name__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_kind(checkpoint)
        saved = checkpoint["sgalign"]
        resumes = self._trainer is not None and self.trainer.training
        check_fixed(self.options, checkpoint["hyper_parameters"], resumes=resumes)
        if resumes:
            check_resumable(checkpoint)
            check_callbacks(checkpoint, self.trainer)
            self.resumed = checkpoint
            self.loaded_step = checkpoint["global_step"]
            self._note_differences(checkpoint)
            for callback in self.trainer.early_stopping_callbacks:  # Lightning would restore the old patience
                if state := checkpoint.get("callbacks", {}).get(callback.state_key):
                    state["patience"] = callback.patience
        self._set_classes(saved["object_names"], saved["predicate_names"], "the checkpoint")
        self.run_seed, self.random_states = saved["run_seed"], saved["random_states"]
        if self.network is None:
            classes, predicates = len(self.object_names), len(self.predicate_names)
            self.make_network(torch.ones(classes, classes, predicates))  # only the shape matters here
        self._leave_out_mirror(checkpoint["state_dict"])
        check_same_weights(checkpoint["state_dict"], self.state_dict(), type(self).__name__)

    def _note_differences(self, checkpoint: dict[str, Any]) -> None:
        """Set `differences` to the options of the module and of the data that differ from the checkpoint."""
        given = {"module": type(self).__name__} | dataclasses.asdict(self.options)
        saved = checkpoint["hyper_parameters"] | {"module": checkpoint["sgalign"]["module"]}
        of_data = differing(self.data.hparams, checkpoint.get("datamodule_hyper_parameters", {}))
        self.differences = differing(given, saved) | {f"data.{name}": values for name, values in of_data.items()}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        **options: Any,
    ) -> Self:
        """Load a module from a checkpoint.

        A module without a mirror can load the checkpoint of the same module with a mirror. For example, Motifs can load
        a checkpoint of Align-Motifs. The mirror's options and weights are then ignored. This method replaces
        Lightning's, which would pass options that the module does not have to its `__init__`.

        Args:
            checkpoint_path: as `source` of `read_checkpoint`.
            map_location: the device that the module is moved to.
            options: options that override the options in the checkpoint. Options that determine what the weights
                compute must be the same.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a checkpoint of this package, or belongs to another module.
        """
        return cls._of_checkpoint(read_checkpoint(checkpoint_path), **options).to(map_location)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Return a module in evaluation mode, as `load_from_checkpoint` loads it.

        Args:
            source: as for `read_checkpoint`, for example a folder of `save_pretrained`.
            options: as for `load_from_checkpoint`.
        """
        return cls.load_from_checkpoint(source, **options).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a folder in the Hugging Face layout: weights, options, class names and a model card.

        Args:
            folder: the folder, which must be new or empty.
        """
        if self.network is None:
            raise InputError(f"{type(self).__name__} must have a network to be saved: train it, or load its weights")
        checkpoint = self.origin | {"state_dict": self.state_dict(), "hyper_parameters": dict(self.hparams)}
        if self._trainer is not None and self.global_step:
            callbacks = {callback.state_key: callback.state_dict() for callback in self.trainer.checkpoint_callbacks}
            run: dict[str, Any] = {"epoch": self.current_epoch, "callbacks": callbacks}
            run["datamodule_hyper_parameters"] = self.data.hparams
            checkpoint |= {"global_step": self.global_step, "training": training_of(run)}
        self.on_save_checkpoint(checkpoint)
        write_pretrained(checkpoint, folder, model_card(checkpoint, real_path(folder).name))

    @classmethod
    def _of_checkpoint(cls, checkpoint: dict[str, Any], **options: Any) -> Self:
        """Build a checkpoint's module. If it has no mirror, remove the mirror's weights from `checkpoint`."""
        cls._check_kind(checkpoint)
        known = {field.name for field in dataclasses.fields(cls.options_type)}
        saved = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
        with only_shapes(checkpoint["state_dict"]):
            cls(**(saved | options)).on_load_checkpoint(checkpoint)
        module = cls(**(saved | options))
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        module.origin = {"global_step": checkpoint.get("global_step", 0), "training": training_of(checkpoint)}
        return module

    @classmethod
    def _check_kind(cls, checkpoint: dict[str, Any]) -> None:
        check_ours(checkpoint, "checkpoint")
        name = checkpoint["sgalign"]["module"]
        # Motifs and SGTR can also load the checkpoint of a subclass, for example of one with a mirror.
        kind = cls if name == cls.__name__ else module_named(name)
        if kind is None or not issubclass(kind, cls):
            raise InputError(f"checkpoint must belong to {cls.__name__}, but belongs to {name}")

    def _set_classes(self, object_names: Sequence[str], predicate_names: Sequence[str], whose: str) -> None:
        if self.network is None:
            self.object_names, self.predicate_names = list(object_names), list(predicate_names)
        for kind, ours, theirs in (
            ("object", self.object_names, object_names),
            ("predicate", self.predicate_names, predicate_names),
        ):
            if ours != list(theirs):
                differ = ", ".join(sorted(set(ours) ^ set(theirs))[:3]) or "their order"
                raise InputError(f"{kind} classes of the model and of {whose} must be the same, but differ in {differ}")

    def _leave_out_mirror(self, weights: dict[str, Tensor]) -> None:
        """Remove the mirror's weights from the loaded weights if this module has no mirror."""
        of_model = self.state_dict()
        mirror = [name for name in weights if name.startswith("mirrored_") and name not in of_model]
        if mirror and self._trainer is not None and self.trainer.training:
            raise InputError(
                f"checkpoint has a mirror, so {type(self).__name__} can be tested with it, but cannot resume from it"
            )
        for name in mirror:
            del weights[name]


def module_named(name: str) -> type[SavedModule] | None:
    """Return the imported module class of this name, or None."""
    kinds: list[type[SavedModule]] = [SavedModule]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == name), None)


def load_module(path: str | Path) -> SavedModule:
    """Return the module that a checkpoint or a folder of `save_pretrained` belongs to, on the CPU in evaluation mode.

    Args:
        path: as `source` of `read_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file, folder or model.
        ValueError: if it is not a model of this package.
    """
    checkpoint = read_checkpoint(path)
    name = checkpoint["sgalign"]["module"]
    kind = module_named(name)
    if kind is None:
        raise InputError(f"{path}: must be a checkpoint of a module of this package, got {name!r}")
    try:
        return kind._of_checkpoint(checkpoint).eval()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # the options of a file may be wrong in any way, and torch raises many kinds of error
        if is_lack_of_memory(error) or isinstance(error, ModuleNotFoundError | OSError):
            raise
        raise InputError(f"{path}: must have valid options and names ({type(error).__name__}: {error})") from error
