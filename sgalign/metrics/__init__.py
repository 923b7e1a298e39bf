"""Metrics of scene graph generation and of object detection, as the field computes them."""

from sgalign.data.triplets import zero_shot_triplets
from sgalign.metrics.detection import DetectionEvaluator
from sgalign.metrics.open_images import OpenImagesEvaluator
from sgalign.metrics.recall import PROTOCOLS, SceneGraphEvaluator, predicate_groups
from sgalign.metrics.sgbench import SGBenchEvaluator
from sgalign.metrics.vrd import VRDEvaluator

__all__ = [
    "PROTOCOLS",
    "DetectionEvaluator",
    "OpenImagesEvaluator",
    "SGBenchEvaluator",
    "SceneGraphEvaluator",
    "VRDEvaluator",
    "predicate_groups",
    "zero_shot_triplets",
]
