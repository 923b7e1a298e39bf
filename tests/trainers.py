"""Small trainers and model sizes that several test files share."""

import functools
from pathlib import Path

import lightning.pytorch as pl

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
