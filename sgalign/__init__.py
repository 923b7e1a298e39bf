"""Relation alignment for scene graph generation, nearly free: fused kernels for both branches in one pass."""

from pathlib import Path

from sgalign import nn
from sgalign._version import __version__
from sgalign.alignment import relation_alignment_loss
from sgalign.attention import dual_branch_attention, fused_masked_attention
from sgalign.random_mask import random_attention_mask
from sgalign.relation import dual_branch_relation_logits, fused_relation_logits

_root = Path(__file__).resolve().parent.parent
if (_root / "csrc" / "kernels.h").exists():
    __path__.append(str(_root))  # the source tree keeps kernels/, installed as sgalign.kernels, beside the package

__all__ = [
    "__version__",
    "dual_branch_attention",
    "dual_branch_relation_logits",
    "fused_masked_attention",
    "fused_relation_logits",
    "nn",
    "random_attention_mask",
    "relation_alignment_loss",
]
