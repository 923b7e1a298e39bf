"""Relation alignment for scene graph generation, nearly free: fused kernels for both branches in one pass."""

from pathlib import Path

from sgalign._version import __version__
from sgalign.attention import dual_branch_attention, fused_masked_attention
from sgalign.random_mask import random_attention_mask

_root = Path(__file__).resolve().parent.parent
if (_root / "csrc" / "attention.h").exists():
    __path__.append(str(_root))  # the source tree keeps kernels/, installed as sgalign.kernels, beside the package

__all__ = ["__version__", "dual_branch_attention", "fused_masked_attention", "random_attention_mask"]
