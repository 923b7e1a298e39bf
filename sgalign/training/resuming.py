"""The options of a resumed run. `GivenOptions` restores them after a checkpoint was loaded.

A checkpoint stores options together with the states of the optimizers, such as learning rates and the steps at which
they fall. PyTorch loads both, which overwrites the options that the run was started with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sgalign.errors import InputError

# Attributes of torch's schedules that a resumed run may change. The number of warm-up steps cannot change. Each warm-up
# step multiplies the rate, so another number of steps would lead to a wrong final rate.
SCHEDULE_OPTIONS = {"base_lrs", "milestones", "gamma", "mode", "factor", "patience", "threshold", "threshold_mode"}


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

        self.kinds = [type(schedule).__name__ for schedule in schedules]

    def saved(self) -> dict[str, Any]:
        """Return the entries for a checkpoint: the initial learning rates and the kinds of the schedules."""
        rates = [[float(group.get("initial_lr", group["lr"])) for group in groups] for groups in self.groups]
        return {"rates": rates, "schedules": self.kinds}

    def put_back(
        self, optimizers: Sequence[torch.optim.Optimizer], schedules: Sequence[Any], before: dict[str, Any]
    ) -> list[str]:
        """Restore the run's options after the optimizers and schedules have loaded the states of a checkpoint.

        The current learning rate is multiplied by new initial rate / old initial rate, so the run resumes at the same
        point of the schedule.

        Args:
            optimizers: the optimizers given to `__init__`.
            schedules: the schedules given to `__init__`.
            before: result of `saved` in the checkpoint.

        Returns:
            One sentence for each learning rate that differs from the checkpoint's.

        Raises:
            ValueError: if the schedules differ in type from the schedules in the checkpoint. A schedule that is not in
                the checkpoint has no state to load and would start from the wrong rate.
        """
        if before["schedules"] != self.kinds:
            old, new = (", ".join(kinds) or "none" for kinds in (before["schedules"], self.kinds))
            raise InputError(
                f"the learning rate schedules must be the same as in the checkpoint, {old}, got {new}: use the same "
                "optimizer as before, and warmup_steps only if the first run had a warm-up"
            )
        changed, saved = {}, self.saved()["rates"]
        for optimizer, groups, now, then in zip(optimizers, self.groups, saved, before["rates"], strict=True):
            for group, given, rate, old in zip(optimizer.param_groups, groups, now, then, strict=True):
                states = {"params": group["params"], "lr": group["lr"]}
                group.update(given | states)
                if rate != old:
                    group["lr"] = group["lr"] * (rate / old) if old else rate
                    changed[rate, old] = f"learning rate {rate:g} instead of {old:g} as in the checkpoint"
        for schedule, given in zip(schedules, self.schedules, strict=True):
            vars(schedule).update(given)
        return list(changed.values())
