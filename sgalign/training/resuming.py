"""A run that goes on from a checkpoint: its optimizers' states are the checkpoint's, its options its own.

A checkpoint has options among the states, such as learning rates and the steps at which they fall. PyTorch loads them
with the rest, in place of those that the run was started with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sgalign.errors import InputError

# Of torch's schedules, those that count in the steps to come. A warm-up goes on as it has begun: its steps multiply the
# rate, and would miss their end if their number changed.
SCHEDULE_OPTIONS = {"base_lrs", "milestones", "gamma", "mode", "factor", "patience", "threshold", "threshold_mode"}


class GivenOptions:
    """The options of optimizers and schedules before a checkpoint's states replace them.

    Args:
        optimizers, schedules: as they were made.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence[Any]) -> None:
        self.groups = [[copy.copy(group) for group in optimizer.param_groups] for optimizer in optimizers]
        self.schedules = [
            {name: copy.copy(value) for name, value in vars(schedule).items() if name in SCHEDULE_OPTIONS}
            for schedule in schedules
        ]

        self.kinds = [type(schedule).__name__ for schedule in schedules]

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the learning rates that schedules begin with, and the schedules' kinds."""
        rates = [[float(group.get("initial_lr", group["lr"])) for group in groups] for groups in self.groups]
        return {"rates": rates, "schedules": self.kinds}

    def put_back(
        self, optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence[Any], before: dict[str, Any]
    ) -> list[str]:
        """Give the options back to optimizers and schedules that have a checkpoint's states.

        A learning rate stays where its schedule is: it changes by as much as the rate that schedules begin with.

        Args:
            optimizers, schedules: the same as before.
            before: what the checkpoint has of `saved`.

        Returns:
            a sentence for each learning rate that is another than the checkpoint's.

        Raises:
            ValueError: the schedules are of other kinds. One without a state would begin anew, from the wrong rate.
        """
        if before["schedules"] != self.kinds:
            old, new = (", ".join(kinds) or "none" for kinds in (before["schedules"], self.kinds))
            raise InputError(
                f"the learning rate's schedules must be those of the checkpoint, {old}, got {new}: "
                "choose the same optimizer, and a warm-up if there was one"
            )
        changed, saved = {}, self.saved()["rates"]
        for optimizer, groups, now, then in zip(optimizers, self.groups, saved, before["rates"], strict=True):
            for group, given, rate, old in zip(optimizer.param_groups, groups, now, then, strict=True):
                states = {"params": group["params"], "lr": group["lr"]}
                group.update(given | states)
                if rate != old:
                    group["lr"] = group["lr"] * (rate / old) if old else rate
                    changed[rate, old] = f"learning rate {rate:g}, not {old:g} as before the checkpoint"
        for schedule, given in zip(schedules, self.schedules, strict=True):
            vars(schedule).update(given)
        return list(changed.values())
