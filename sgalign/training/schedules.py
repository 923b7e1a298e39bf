"""Schedules of the learning rate."""

from __future__ import annotations

from typing import Any

import torch


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Any]]:
    """Return a list with the scheduler of the warm-up. The list is empty if `steps` is 0.

    The learning rate grows linearly from a tenth to its full value over `steps` optimizer steps.
    """
    if not steps:
        return []
    return [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), "interval": "step"}]
