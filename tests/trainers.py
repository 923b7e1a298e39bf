"""Trainers and networks small enough for tests."""

import lightning.pytorch as pl

SMALL_MOTIFS = {"embed_dim": 12, "hidden_dim": 8, "relation_dim": 16}


def trainer(**options) -> pl.Trainer:
    """Return a Lightning trainer of one epoch on the CPU that writes nothing, but for these options."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(**(defaults | quiet | options))
