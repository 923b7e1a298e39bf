"""Small trainers, model sizes and scenes that several test files share."""

import functools
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl

from sgalign.data import SceneGraph, ScenesDataset
from sgalign.training import datamodule

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL_MOTIFS = {"embed_dim": 12, "hidden_dim": 8, "relation_dim": 16}
SMALL_DETR = {
    "backbone": "resnet10", "stride": 16, "dim": 32, "heads": 4, "ffn_dim": 32, "entity_layers": 2,
    "entity_queries": 12, "short_sides": [48, 64], "long_side": 96, "learning_rate": 1e-3,
}  # fmt: skip
SMALL_SGTR = SMALL_DETR | {"encoder_layers": 1, "layers": 2, "queries": 9}


def trainer(**options) -> pl.Trainer:
    """Return a Lightning trainer of one epoch on the CPU that writes nothing, unless the options say otherwise."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(**(defaults | quiet | options))


trainer_without_sanity_check = functools.partial(trainer, num_sanity_val_steps=0)


@functools.cache
def scenes(split, size, seed) -> list[SceneGraph]:
    return list(ScenesDataset(split, size=size, seed=seed))


class GeneratedOnce(ScenesDataset):
    """Generated scenes that all tests of a process share, because generating a whole split takes up to two seconds."""

    def __iter__(self) -> Iterator[SceneGraph]:
        return iter(scenes(self.split, self.size, self.seed))


datamodule.ScenesDataset = GeneratedOnce  # for all test files, because pytest imports them before it runs any test
