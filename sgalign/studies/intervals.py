"""Differences between the arms of a study, with bootstrap intervals over seeds and test images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.studies.results import Result

SAMPLES = 2000  # number of bootstrap samples


def paired_difference(
    runs: Sequence[Result], base: Sequence[Result], metric: str, k: int
) -> tuple[float, float, float]:
    """Return the mean difference between `runs` and `base`, and the ends of its 95 % bootstrap interval.

    The bootstrap draws test images and seeds with replacement, and uses the same draw for `runs` and `base`. With few
    seeds the interval is somewhat too narrow, because the bootstrap underestimates the variance over S seeds by the
    factor (S - 1) / S.

    Args:
        runs, base: results as `read_result` returns them. Only runs whose seed is in both are compared.
        metric: "R" or "mR".
        k: K of the metric, at most 100.

    Raises:
        ValueError: if no seed is in both, or the runs were tested on different images.
    """
    by_seed = {run["seed"]: run for run in base}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        raise InputError(
            f"base must have at least one of the seeds {sorted(run['seed'] for run in runs)}, got {sorted(by_seed)}"
        )
    if any(run["predicates"] != pairs[0][0]["predicates"] for both in pairs for run in both):
        raise InputError("runs and base must have the same test images, got different ones")
    image, predicate = _units(pairs[0][0], metric)
    differences = torch.stack([_recalls(run, metric, k) - _recalls(other, metric, k) for run, other in pairs])
    generator = torch.Generator().manual_seed(0)
    images, predicates = len(pairs[0][0]["predicates"]), int(max(map(max, filter(None, pairs[0][0]["predicates"]))))
    seeds = torch.randint(len(pairs), (SAMPLES, len(pairs)), generator=generator)
    drawn = torch.randint(images, (SAMPLES, images), generator=generator)
    weights = torch.zeros(SAMPLES, images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    # The first row is the original sample, with weight 1 for each image.
    weights = torch.cat((torch.ones(1, images, dtype=torch.float64), weights))[:, image]
    sampled = torch.cat((differences.mean(0, keepdim=True), differences[seeds].mean(1)))
    total = torch.zeros(SAMPLES + 1, predicates + 1, dtype=torch.float64)
    count = total.index_add(1, predicate, weights)
    total.index_add_(1, predicate, weights * sampled)
    # A predicate that does not occur in the drawn images counts as 0, as in the metric.
    value = (total / count.clamp(min=1)).sum(1)
    if metric == "mR":
        value /= sum(map(len, pairs[0][0]["groups"].values()))
    low, high = value[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value[0].item(), low, high


def _units(run: Result, metric: str) -> tuple[Tensor, Tensor]:
    """Return the image index and the predicate of each unit that a metric averages over, int64 `[U]` each.

    For "R", a unit is an image, and its predicate is 0. For "mR", a unit is an image and one of its predicates.
    """
    units = [
        (image, predicate)
        for image, predicates in enumerate(run["predicates"])
        for predicate in (sorted(set(predicates)) if metric == "mR" else [0][: len(predicates)])
    ]
    image, predicate = torch.tensor(units).unbind(1)
    return image, predicate


def _recalls(run: Result, metric: str, k: int) -> Tensor:
    """Return the recall of each unit of `_units`, float64 `[U]`."""
    recalls = []
    for predicates, ranks in zip(run["predicates"], run["ranks"], strict=True):
        found: dict[int, list[bool]] = {}
        for predicate, rank in zip(predicates, ranks, strict=True):
            found.setdefault(predicate if metric == "mR" else 0, []).append(rank < k)
        recalls += [sum(found[key]) / len(found[key]) for key in sorted(found)]
    return torch.tensor(recalls, dtype=torch.float64)
