"""Relation alignment for scene graph generation.

Fused kernels compute the supervised and the mirrored branch in one pass.
"""

import importlib.util
import sys
from pathlib import Path

from sgalign import nn
from sgalign._version import __version__
from sgalign.nn.alignment import RelationAlignment
from sgalign.ops._registration import add_flop_formulas
from sgalign.ops.alignment import relation_alignment_loss
from sgalign.ops.attention import attention_weights, dual_branch_attention, fused_masked_attention
from sgalign.ops.random_mask import random_attention_mask
from sgalign.ops.relation import dual_branch_relation_logits, fused_relation_logits

add_flop_formulas()  # for programs that were exported, if torch's counter is already imported
_kernels = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
if not Path(__file__).with_name("kernels").exists() and _kernels.exists():
    # In the source tree, kernels/ is next to the package. In an installation it is inside, as sgalign.kernels.
    _spec = importlib.util.spec_from_file_location("sgalign.kernels", _kernels)
    assert _spec is not None and _spec.loader is not None
    kernels = sys.modules["sgalign.kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

__all__ = [
    "RelationAlignment",
    "__version__",
    "attention_weights",
    "dual_branch_attention",
    "dual_branch_relation_logits",
    "fused_masked_attention",
    "fused_relation_logits",
    "nn",
    "random_attention_mask",
    "relation_alignment_loss",
]
