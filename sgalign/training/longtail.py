"""The field's standard means against the long tail of predicates: resampling, weighting, logit adjustment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DistributedSampler

from sgalign.data import GraphBatch, SceneGraph, count_predicates
from sgalign.errors import InputError

PredicateWeights = Literal["none", "inverse_frequency", "effective_number"]


class RelationLoss(nn.Module):
    """Mean cross-entropy of pairs with target distributions, weighted and adjusted for how often predicates occur.

    The weighted mean divides by the sum of the targets' weights, as `torch.nn.functional.cross_entropy` does; a row of
    zeros is a pair without a label and does not count. Buffers are of the training part and travel in checkpoints.

    Args:
        counts: `[K + 1]`, pairs of each predicate in training, column 0 those of the background.
        weights: "inverse_frequency", count^-power; "effective_number", (1 - beta) / (1 - beta^count) (Cui et al.,
            CVPR 2019); or "none". The background has a weight as any predicate; the mean over training pairs is 1.
        power, beta: of `weights`.
        adjustment: tau, adds tau log(prior) to the logits in the loss (Menon et al., ICLR 2021, equation 10).
        adjustment_test: tau, subtracts tau log(prior) from the logits of a trained model (ibid., equation 9).

    A predicate's prior is relative to that of equally frequent predicates; the background is not adjusted, so that what
    is rebalanced is the predicates and not how many pairs are related.
    """

    weight: Tensor
    log_prior: Tensor

    def __init__(
        self,
        counts: Tensor,
        *,
        weights: PredicateWeights = "none",
        power: float = 0.5,
        beta: float = 0.999,
        adjustment: float = 0.0,
        adjustment_test: float = 0.0,
    ) -> None:
        super().__init__()
        self.adjustment, self.adjustment_test = adjustment, adjustment_test
        counts = counts.double().clamp(min=1)
        weight = torch.ones_like(counts)
        if weights == "inverse_frequency":
            weight = counts**-power
        elif weights == "effective_number":
            weight = (1 - beta) / (1 - beta**counts)
        elif weights != "none":
            raise InputError(f"weights must be none, inverse_frequency or effective_number, got {weights!r}")
        weight *= counts.sum() / (counts * weight).sum()
        prior = counts[1:] / counts[1:].mean()
        self.register_buffer("weight", weight.float())
        self.register_buffer("log_prior", torch.cat((prior.new_ones(1), prior)).log().float())

    def forward(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss and its divisor, for logits and targets `[R, K + 1]`; both are 0 without labels."""
        total = (targets * self.weight).sum()
        logits = logits + self.adjustment * self.log_prior if self.adjustment else logits
        loss = functional.cross_entropy(logits, targets, weight=self.weight, reduction="sum")
        return loss / total.clamp(min=1e-12), total

    def adjusted(self, logits: Tensor) -> Tensor:
        """Return logits `[R, K + 1]` of a trained model after `adjustment_test`."""
        return logits - self.adjustment_test * self.log_prior if self.adjustment_test else logits


def repeat_factors(graphs: Iterable[SceneGraph], num_predicates: int, threshold: float) -> Tensor:
    """Return how often to show images with each predicate, as LVIS repeats images (Gupta et al., CVPR 2019).

    Args:
        num_predicates: without the background.
        threshold: t of max(1, sqrt(t / f)), f being the predicate's share of all relations, as in BGNN (Li et al.,
            CVPR 2021; in LVIS of all images), where t is 0.13 for Visual Genome; 0 for 1 everywhere.

    Returns:
        float64 `[num_predicates + 1]`, 1 for the background and for what never occurs.
    """
    counts = count_predicates(graphs, num_predicates).double()
    share = counts / counts.sum().clamp(min=1)
    return torch.where(share > 0, (threshold / share.clamp(min=1e-300)).sqrt().clamp(min=1), 1.0)


class RepeatSampler(DistributedSampler[int]):
    """Draws images as often as their rarest predicate should be seen, in an order of seed and epoch alone.

    An image that should be seen r times an epoch is seen floor(r) or ceil(r) times, r on average; an epoch has the same
    length always. Shards, shuffling and `set_epoch` are those of `DistributedSampler`.

    Args:
        graphs: to draw from.
        factors: of `repeat_factors`.
        num_replicas, rank, seed: as for `DistributedSampler`.
    """

    def __init__(
        self, graphs: Sequence[SceneGraph], factors: Tensor, *, num_replicas: int, rank: int, seed: int
    ) -> None:
        ends = torch.stack([factors[graph.relations[:, 2]].amax() for graph in graphs]).cumsum(0)
        draws = math.ceil(ends[-1].item())
        self.ends = ends * (draws / ends[-1])
        self.done = 0, 0  # an epoch, and how many of its images another run has seen
        super().__init__(range(draws), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.done
        # One draw shifts a comb of unit steps over all images laid end to end.
        shift = torch.rand((), generator=torch.Generator().manual_seed(self.seed + self.epoch), dtype=torch.float64)
        positions = torch.tensor(list(super().__iter__())[seen if epoch == self.epoch else 0 :]) + shift
        return iter(torch.searchsorted(self.ends, positions, right=True).clamp(max=len(self.ends) - 1).tolist())


def drop_repeated(batch: GraphBatch, factors: Tensor, rate: float, generator: torch.Generator) -> GraphBatch:
    """Return the batch without some labels of images that are repeated for a rarer predicate: BGNN's instance dropping.

    A pair whose rarest predicate has factor r, in an image seen R times, loses its label with probability
    rate (1 - r / R): it has a target of zeros, which `RelationLoss` does not count.

    Args:
        batch: on the host.
        factors: of `repeat_factors`.
        rate: 1.6 in BGNN's training on Visual Genome.
        generator: on the CPU; what is drawn depends on it alone.
    """
    factors = factors.to(batch.targets)
    images = batch.images[batch.pairs[:, 0]]
    pair = torch.where(batch.targets[:, 1:] > 0, factors[1:], 0).amax(1)
    image = torch.ones(len(batch.lengths)).to(pair).scatter_reduce_(0, images, pair, "amax")
    probability = rate * (1 - pair / image[images])
    drawn = torch.rand(len(pair), generator=generator).to(pair)
    dropped = (pair > 0) & (drawn < probability)
    return batch._replace(targets=batch.targets.masked_fill(dropped[:, None], 0), related=batch.related & ~dropped)
