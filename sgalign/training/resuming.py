"""The options of a resumed run, which come from the config and the command line.

A checkpoint stores the options of its run, and the states of the optimizers and schedules, which contain learning rates
and the steps at which they fall. `check_fixed` raises an error if an option that cannot change differs. PyTorch loads
the states, which overwrites the run's own options. `GivenOptions` restores them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import MultiStepLR

from sgalign.errors import InputError, shown
from sgalign.training.options import Options

# Attributes of torch's schedules that a resumed run may change.
SCHEDULE_OPTIONS = {"base_lrs", "milestones", "gamma", "mode", "factor", "patience", "threshold", "threshold_mode"}


def differing(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the given and the saved value of each option that differs. An option that only one has is left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # no option is a tensor, but files may hold anything
            return value.tolist()
        return list(value) if isinstance(value, tuple) else value

    return {
        name: (given[name], saved[name]) for name in given if plain(given[name]) != plain(saved.get(name, given[name]))
    }


def check_fixed(options: Options, saved: Mapping[str, Any], *, resumes: bool) -> None:
    """Raise InputError if an option differs from the checkpoint and cannot change.

    Args:
        options: the given options.
        saved: the options in the checkpoint.
        resumes: True if training resumes. False if the weights are only evaluated.
    """
    for name, (given, before) in differing(dataclasses.asdict(options), saved).items():
        kind = options.fixed.get(name)
        if kind == "network" or (resumes and (kind == "training" or (kind == "start" and given is not None))):
            why = ". Only a new run reads it" if kind == "start" else ""
            raise InputError(f"{name} must be {before!r}, as in the checkpoint, got {given!r}{why}")


def continue_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Change the progress in a checkpoint so that Lightning leaves nothing out when it resumes.

    Lightning would leave out the rest of an epoch in which `max_steps` has ended the run, because it counts this epoch
    as completed. It would also leave out a validation in which the run was interrupted.

    Args:
        checkpoint: a checkpoint whose states are not loaded yet.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    validated = loop["epoch_loop.val_loop.batch_progress"]
    for progress in (epochs["total"], epochs["current"]):
        progress["ready"] = progress["started"]  # an epoch that was about to start begins anew
    if not batches["is_last_batch"]:
        for progress in (epochs["total"], epochs["current"]):
            if 0 < progress["started"] == progress["processed"]:
                progress["processed"] = progress["completed"] = progress["started"] - 1
    elif (
        epochs["current"]["processed"] < epochs["current"]["started"]
        and _is_complete(batches["current"])
        and not (validated["is_last_batch"] and _is_complete(validated["current"]))
    ):  # Lightning repeats a validation only if its progress says that a batch has begun
        for part in ("total", "current"):
            validated[part] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _is_complete(progress: Mapping[str, int]) -> bool:
    return progress["completed"] == progress["ready"]


class GivenOptions:
    """A copy of the options of optimizers and schedules, made before a checkpoint's states replace them.

    Args:
        optimizers: the optimizers as the run made them.
        schedules: the learning rate schedules as the run made them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence[Any]) -> None:
        self.groups = [[copy.copy(group) for group in optimizer.param_groups] for optimizer in optimizers]
        self.schedules = [
            {name: copy.copy(value) for name, value in vars(schedule).items() if name in SCHEDULE_OPTIONS}
            for schedule in schedules
        ]

    def put_back(self, optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence[Any]) -> list[str]:
        """Restore the run's options after the optimizers and schedules have loaded the states of a checkpoint.

        The current learning rate is multiplied by new initial rate / old initial rate, so the run resumes at the same
        point of the schedule. If the steps at which the rate falls have changed, the rate falls or rises to the value
        that it would have had with the new steps.

        Args:
            optimizers: the optimizers given to `__init__`.
            schedules: the schedules given to `__init__`.

        Returns:
            The changes of initial learning rates, such as "0.1 instead of 0.2".
        """
        changed: dict[str, None] = {}  # a dict keeps the order and drops repetitions
        for optimizer, groups in zip(optimizers, self.groups, strict=True):
            for group, given in zip(optimizer.param_groups, groups, strict=True):
                rate, old = (one.get("initial_lr", one["lr"]) for one in (given, group))
                states = {"params": group["params"], "lr": group["lr"]}
                group.update(given | states)
                if rate != old:
                    group["lr"] = group["lr"] * (rate / old) if old else rate
                    changed[f"{rate:g} instead of {old:g}"] = None
        for schedule, given in zip(schedules, self.schedules, strict=True):
            if not (before := _fallen(schedule)):
                raise InputError(
                    f"ckpt_path must have a learning rate above 0, but its schedule multiplies it by {schedule.gamma} "
                    f"to the power of {shown(sum(schedule.milestones.values()))}"
                )
            vars(schedule).update(given)
            for group in schedule.optimizer.param_groups:
                group["lr"] *= _fallen(schedule) / before
        return list(changed)


def _fallen(schedule: Any) -> float:
    """Return the factor by which the drops of a MultiStepLR so far have multiplied the learning rate."""
    if not isinstance(schedule, MultiStepLR):
        return 1.0
    return schedule.gamma ** sum(count for step, count in schedule.milestones.items() if step <= schedule.last_epoch)
