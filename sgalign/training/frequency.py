"""The frequency baseline as a Lightning module."""

from __future__ import annotations

from torch import Tensor

from sgalign.data import GraphBatch
from sgalign.models import (
    FrequencyBaseline,
    Prediction,
)
from sgalign.training.base import RelationModule


class FrequencyModule(RelationModule):
    """The frequency baseline: nothing to train, so `sgalign test --model FrequencyModule` is all it takes."""

    def make_network(self, counts: Tensor) -> None:
        self.network = FrequencyBaseline(counts)

    def forward(self, batch: GraphBatch) -> Prediction:
        assert self.network is not None
        return Prediction(self.network(batch), batch.labels)
