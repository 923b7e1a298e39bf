"""Adam, and schedules of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision


def adam(parameters: Iterable[torch.nn.Parameter], rate: float, trainer: pl.Trainer | None) -> torch.optim.Adam:
    """Return Adam with this learning rate. It is fused, unless the trainer clips gradients in mixed precision.

    Lightning refuses to clip the gradients of a fused optimizer in mixed precision.
    """
    clips = trainer is not None and bool(trainer.gradient_clip_val)
    mixed = trainer is not None and isinstance(trainer.precision_plugin, MixedPrecision)
    return torch.optim.Adam(parameters, lr=rate, fused=not (clips and mixed))


def warmup(optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Any]]:
    """Return a list with the scheduler of the warm-up. The list is empty if `steps` is 0.

    The learning rate grows linearly from a tenth to its full value over `steps` optimizer steps.
    """
    if not steps:
        return []
    return [{"scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), "interval": "step"}]
