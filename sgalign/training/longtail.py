"""Standard remedies for the long tail of predicates: resampling, loss weights and logit adjustment."""

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
    """The mean cross-entropy of pairs, with optional weights and logit adjustment for rare predicates.

    Each pair has a target distribution. The weighted mean divides by the sum of the targets' weights, as
    `torch.nn.functional.cross_entropy` does. A target row of zeros marks a pair without a label, which does not count.

    A predicate's prior is its count divided by the mean count of all predicates. The background's logit is not
    adjusted, so the adjustment rebalances the predicates but does not change the share of related pairs. The weights
    and priors are buffers, computed from the training split and saved in checkpoints.

    Args:
        counts: number of training pairs of each predicate, `[K + 1]`, with the background in column 0.
        weights: "inverse_frequency" for count^-power, "effective_number" for (1 - beta) / (1 - beta^count) (Cui et al.,
            CVPR 2019), or "none". The background has a weight like any predicate. The mean weight over training pairs
            is 1.
        power: exponent of "inverse_frequency".
        beta: beta of "effective_number".
        adjustment: tau for training. The loss adds tau log(prior) to the logits (Menon et al., ICLR 2021, equation 10).
        adjustment_test: tau for a trained model. `adjusted` subtracts tau log(prior) from the logits (Menon et al.,
            equation 9).
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
        """Return the weighted mean loss and the sum of weights that it was divided by.

        Logits and targets are `[R, K + 1]`. If no pair has a label, both results are 0.
        """
        total = (targets * self.weight).sum()
        logits = logits + self.adjustment * self.log_prior if self.adjustment else logits
        loss = functional.cross_entropy(logits, targets, weight=self.weight, reduction="sum")
        return loss / total.clamp(min=1e-12), total

    def adjusted(self, logits: Tensor) -> Tensor:
        """Return a trained model's logits `[R, K + 1]` after the adjustment by `adjustment_test`."""
        return logits - self.adjustment_test * self.log_prior if self.adjustment_test else logits


def repeat_factors(graphs: Iterable[SceneGraph], num_predicates: int, threshold: float) -> Tensor:
    """Return the factor by which images with each predicate are repeated, after LVIS (Gupta et al., CVPR 2019).

    The factor is max(1, sqrt(t / f)), where f is the predicate's share of all relations, as in BGNN (Li et al., CVPR
    2021). In LVIS f is a share of all images.

    Args:
        graphs: the training split.
        num_predicates: number of predicates without the background.
        threshold: the threshold t. BGNN uses 0.13 for Visual Genome. With 0, every factor is 1.

    Returns:
        float64 `[num_predicates + 1]`, 1 for the background and for predicates that never occur.
    """
    counts = count_predicates(graphs, num_predicates).double()
    share = counts / counts.sum().clamp(min=1)
    return torch.where(share > 0, (threshold / share.clamp(min=1e-300)).sqrt().clamp(min=1), 1.0)


class RepeatSampler(DistributedSampler[int]):
    """A sampler that draws each image in proportion to the repeat factor of its rarest predicate.

    An image with factor r is drawn about r times per epoch on average. The factors are first stretched slightly,
    because their sum must be a whole number. All epochs have the same length. The order depends only on the seed and
    the epoch. Shards, shuffling and `set_epoch` work as in `DistributedSampler`.

    Args:
        graphs: the images to draw from.
        factors: result of `repeat_factors`.
        num_replicas, rank, seed: as for `DistributedSampler`.
    """

    def __init__(
        self, graphs: Sequence[SceneGraph], factors: Tensor, *, num_replicas: int, rank: int, seed: int
    ) -> None:
        # Factors are at least 1. Class 0 has the factor 1, for images without relations.
        rarest = [torch.cat((factors[:1], factors[graph.relations[:, 2]])).amax() for graph in graphs]
        ends = torch.stack(rarest).cumsum(0)
        draws = math.ceil(ends[-1].item())
        self.ends = ends * (draws / ends[-1])
        self.done = 0, 0  # epoch to resume, and number of images already used
        super().__init__(range(draws), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        epoch, seen = self.done
        # Systematic sampling: the factors are consecutive segments of a line, one per image. Points at distance 1,
        # shifted by one random number, select the segments that contain them.
        shift = torch.rand((), generator=torch.Generator().manual_seed(self.seed + self.epoch), dtype=torch.float64)
        positions = torch.tensor(list(super().__iter__())[seen if epoch == self.epoch else 0 :]) + shift
        return iter(torch.searchsorted(self.ends, positions, right=True).clamp(max=len(self.ends) - 1).tolist())


def drop_repeated(batch: GraphBatch, factors: Tensor, rate: float, generator: torch.Generator) -> GraphBatch:
    """Drop some labels of more common predicates in repeated images, as in BGNN's instance dropping.

    A pair loses its label with probability min(1, rate * (1 - r / R)), where r is the factor of the pair's rarest
    predicate and R is the largest r in the image. The pair's target row becomes zeros, and `RelationLoss` ignores such
    rows.

    Args:
        batch: the batch, on the host.
        factors: result of `repeat_factors`.
        rate: drop rate. BGNN uses 1.6 on Visual Genome.
        generator: random generator on the CPU. It is the only source of randomness.
    """
    factors = factors.to(batch.targets)
    images = batch.images[batch.pairs[:, 0]]
    pair = torch.where(batch.targets[:, 1:] > 0, factors[1:], 0).amax(1)
    image = torch.ones(len(batch.lengths)).to(pair).scatter_reduce_(0, images, pair, "amax")
    probability = rate * (1 - pair / image[images])
    drawn = torch.rand(len(pair), generator=generator).to(pair)
    dropped = (pair > 0) & (drawn < probability)
    return batch._replace(targets=batch.targets.masked_fill(dropped[:, None], 0), related=batch.related & ~dropped)
