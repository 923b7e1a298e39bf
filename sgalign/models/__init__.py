"""Scene graph models: each maps a `GraphBatch` to the predicate logits of its pairs."""

from sgalign.models.frequency import FrequencyBaseline, predicate_counts
from sgalign.models.motifs import Motifs

__all__ = ["FrequencyBaseline", "Motifs", "predicate_counts"]
