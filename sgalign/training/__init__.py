"""Training and evaluation with Lightning: a module for each system, the data modules and the file writers."""

from sgalign.training.align_motifs import AlignMotifsModule
from sgalign.training.align_sgtr import AlignSGTRModule
from sgalign.training.base import SavedModule, load_module
from sgalign.training.checkpoints import read_checkpoint
from sgalign.training.controls import AveragedTeacherModule, GrowingMaskModule, MaskedMotifsModule
from sgalign.training.datamodule import SceneGraphData
from sgalign.training.detector import DetectorModule
from sgalign.training.detr import EntityDetectorModule
from sgalign.training.evaluation import RelationModule
from sgalign.training.frequency import FrequencyModule
from sgalign.training.motifs import MotifsModule
from sgalign.training.scarce import ScarceData
from sgalign.training.sgtr import SGTRModule
from sgalign.training.simulated import SimulatedData
from sgalign.training.writers import (
    DetectionWriter,
    PredictionWriter,
    TripletWriter,
)

__all__ = [
    "AlignMotifsModule",
    "AlignSGTRModule",
    "AveragedTeacherModule",
    "DetectionWriter",
    "DetectorModule",
    "EntityDetectorModule",
    "FrequencyModule",
    "GrowingMaskModule",
    "MaskedMotifsModule",
    "MotifsModule",
    "PredictionWriter",
    "RelationModule",
    "SGTRModule",
    "ScarceData",
    "SavedModule",
    "SceneGraphData",
    "SimulatedData",
    "TripletWriter",
    "load_module",
    "read_checkpoint",
]
