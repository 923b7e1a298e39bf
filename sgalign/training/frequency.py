"""The frequency baseline as a Lightning module."""

from __future__ import annotations

from torch import Tensor

from sgalign.data import SeenBatch
from sgalign.models import FrequencyBaseline, Prediction
from sgalign.training.options import Options
from sgalign.training.pairs import PairModule


class FrequencyModule(PairModule):
    """The frequency baseline. It needs no training: run `sgalign test --model FrequencyModule`."""

    network: FrequencyBaseline

    def __init__(self) -> None:
        super().__init__(Options())

    def make_network(self, counts: Tensor) -> None:
        self.network = FrequencyBaseline(counts)

    def forward(self, seen: SeenBatch) -> Prediction:
        return Prediction(self.network(seen.graph), seen.graph.labels)
