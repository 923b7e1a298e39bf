"""The `SceneGraph` type that every part of the package reads, and the data sets that yield it."""

from sgalign.data.batch import GraphBatch, Objects, SeenBatch, VisualFeatures, collate, collate_detected
from sgalign.data.coco import CocoDataset
from sgalign.data.detections import Detections, read_detections
from sgalign.data.gqa import GQADataset
from sgalign.data.images import load_image
from sgalign.data.open import open_dataset
from sgalign.data.open_images import OpenImagesDataset
from sgalign.data.predictions import PredictionFile
from sgalign.data.psg import PSGDataset
from sgalign.data.scene_graph import SceneGraph, count_predicates
from sgalign.data.scenes import ScenesDataset
from sgalign.data.vg150 import VG150Dataset
from sgalign.data.vrd import VRDDataset
from sgalign.data.word_vectors import read_word_vectors

__all__ = [
    "CocoDataset",
    "Detections",
    "GQADataset",
    "GraphBatch",
    "Objects",
    "OpenImagesDataset",
    "PSGDataset",
    "PredictionFile",
    "SceneGraph",
    "ScenesDataset",
    "SeenBatch",
    "VG150Dataset",
    "VRDDataset",
    "VisualFeatures",
    "collate",
    "collate_detected",
    "count_predicates",
    "load_image",
    "open_dataset",
    "read_detections",
    "read_word_vectors",
]
