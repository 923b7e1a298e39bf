"""The `torch.nn` modules on top of the fused operations, and the mirrored branch of any decoder.

- `attention`: `MaskedMultiheadAttention`
- `replace`: `replace_attention`, which puts it in the place of torch's module
- `transformers`: `register_with_transformers`, which adds ``attn_implementation="sgalign"`` to transformers
- `alignment`: `RelationAlignment` and `Mirror`, which align a mirrored branch of a model
- `selection`: the attention modules that a mirror masks
- `branches`: the attention of these modules inside a mirror
"""

from sgalign.nn.alignment import Mirror, RelationAlignment
from sgalign.nn.attention import MaskedMultiheadAttention
from sgalign.nn.replace import replace_attention
from sgalign.nn.transformers import register_with_transformers

__all__ = [
    "MaskedMultiheadAttention",
    "Mirror",
    "RelationAlignment",
    "register_with_transformers",
    "replace_attention",
]
