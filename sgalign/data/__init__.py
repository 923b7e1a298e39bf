"""Scene graphs: the type every part of the package reads, and the data sets that yield it."""

from sgalign.data.batch import GraphBatch, collate
from sgalign.data.scene_graph import SceneGraph
from sgalign.data.scenes import ScenesDataset
from sgalign.data.vrd import VRDDataset
from sgalign.data.word_vectors import read_word_vectors

__all__ = ["GraphBatch", "SceneGraph", "ScenesDataset", "VRDDataset", "collate", "read_word_vectors"]
