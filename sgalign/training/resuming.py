"""The options of a resumed run. Its optimizers take their states from the checkpoint, but keep the run's own options.

A checkpoint stores options among the optimizers' states, such as learning rates and the steps at which they fall.
PyTorch loads these too, and so replaces the options that the run was started with. `GivenOptions` restores them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from sgalign.errors import InputError

# Attributes of torch's schedules that a resumed run may change. The number of warm-up steps is not among them: each
# warm-up step multiplies the rate, and the rate would miss its final value if the number changed.
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
        """Restore the options in optimizers and schedules that have loaded a checkpoint's states.

        The current learning rate is scaled by the ratio of the new initial rate to the old one, so it keeps its place
        in the schedule.

        Args:
            optimizers: the optimizers given to `__init__`.
            schedules: the schedules given to `__init__`.
            before: result of `saved` in the checkpoint.

        Returns:
            One sentence for each learning rate that differs from the checkpoint's.

        Raises:
            ValueError: if the schedules are of other kinds. A schedule without a state would start over from the wrong
                rate.
        """
        if before["schedules"] != self.kinds:
            old, new = (", ".join(kinds) or "none" for kinds in (before["schedules"], self.kinds))
            raise InputError(
                f"the learning rate's schedules must be those of the checkpoint, {old}, got {new}: choose the same "
                "optimizer as before, and a warm-up only if there was one"
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
