"""Checks of options that several modules share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sgalign.errors import InputError
from sgalign.ops.alignment import DIRECTIONS, REDUCTIONS


def check_mirror(options: Any) -> None:
    """Of the options that Align-Motifs and Align-SGTR share."""
    if not 0 <= options.mask_ratio <= 1:
        raise InputError(f"mask_ratio must be in [0, 1], got {options.mask_ratio}")
    check_at_least(0, options, ("alignment_weight", "alignment_warmup"))
    check_choice("reduction", options.reduction, REDUCTIONS)
    check_choice("direction", options.direction, DIRECTIONS)


def alignment_weight(options: Any, step: int) -> float:
    """lambda, or during `alignment_warmup` its share that the steps so far have reached."""
    warmup = options.alignment_warmup
    return options.alignment_weight * (min(1.0, step / warmup) if warmup else 1.0)


def check_at_least(least: int, options: Any, names: Sequence[str]) -> None:
    for name in names:
        if not least <= options[name] < float("inf"):
            raise InputError(f"{name} must be at least {least} and finite, got {options[name]}")


def check_learning_rate(name: str, rate: float) -> None:
    if not 0 < rate < float("inf"):
        raise InputError(f"{name} must be above 0 and finite, got {rate}")


def check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, got {choice!r}")
