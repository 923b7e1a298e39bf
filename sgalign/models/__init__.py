"""Networks that predict relations, and networks that find objects and their features in images."""

from sgalign.models.detector import Detector, ImageFeatures, ObjectDetections
from sgalign.models.frequency import FrequencyBaseline, predicate_counts
from sgalign.models.label_decoder import LabelDecoder
from sgalign.models.motifs import Motifs, Prediction
from sgalign.models.regions import RegionFeatures

__all__ = [
    "Detector",
    "FrequencyBaseline",
    "ImageFeatures",
    "LabelDecoder",
    "Motifs",
    "ObjectDetections",
    "Prediction",
    "RegionFeatures",
    "predicate_counts",
]
