"""The fused attention as an attention implementation of the library transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sgalign.errors import InputError
from sgalign.nn.branches import attend
from sgalign.ops._operands import dropped_entries

NAME = "sgalign"  # value of attn_implementation
# arguments that some models pass to their attention
_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "output_attentions")


def register_with_transformers() -> None:
    """Make ``attn_implementation="sgalign"`` available in the library transformers.

    Afterwards, call ``model.set_attn_implementation("sgalign")``, or pass ``attn_implementation`` to
    ``from_pretrained``. It works for every model whose attention goes through transformers' `AttentionInterface`.
    Calling this function again has no effect.

    The attention raises InputError in these cases:

    - The model changes the scores by a position bias, attention sinks or a soft cap.
    - It asks for the attention weights.
    - A floating-point mask holds other values than 0, -inf and the lowest number of its dtype. On a GPU, a device-side
      assertion fails.

    Raises:
        ImportError: if transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def uses_sgalign(module: nn.Module) -> bool:
    """Return True if a module of transformers may call our attention function."""
    # A mirror asks all modules in each step, and `getattr` is slow for a module without the attribute.
    return getattr(module.__dict__.get("config"), "_attn_implementation", None) == NAME


def _mask(*, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """Return the bool mask of a model's attention, True = kept, or None if all entries are kept.

    It is the mask that transformers makes for `scaled_dot_product_attention`, except for padding among the keys. That
    mask is a view of the padding ``[B, Lk]``, because transformers may pass the doubled batch size of a mirror.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    padding = options.get("attention_mask")
    only_padding = options.get("mask_function") is bidirectional_mask_function and not options.get("kv_offset")
    if only_padding and padding is not None and padding.dim() == 2 and padding.shape[1] == kv_length:
        return padding.bool()[:, None, None].expand(-1, 1, q_length, -1)
    # Not every causal model has the attribute `is_causal`, so a causal mask is never left out.
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **options | {"allow_is_causal_skip": False})


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' function for `scaled_dot_product_attention` does.

    Args:
        module: the attention module.
        query: the queries, ``[B, H, Lq, D]``.
        key, value: the keys and values, ``[B, H', Lk, D]``. H' divides H. The value may have another D.
        attention_mask: the mask, broadcastable to ``[B, H, Lq, Lk]``. It is bool (True means kept), or floating point
            and added to the scores.
        dropout, scaling, is_causal, options: as transformers passes them.

    Returns:
        The output, ``[B, Lq, H, D]``, and None in place of the weights.

    Raises:
        ValueError: if the model needs something that the kernels do not have.
    """
    for name in _UNSUPPORTED:
        if options.get(name) is not None and options[name] is not False:
            raise InputError(
                f'attn_implementation must not be "{NAME}" for {type(module).__name__}, which uses {name}: the kernels'
                " do not support it"
            )
    if query.shape[1] != key.shape[1]:  # several heads of queries share the keys and values of one head
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and query.shape[2] > 1:
        attention_mask = query.new_ones((query.shape[2], key.shape[2]), dtype=torch.bool).tril()
    dim, value_dim = query.shape[3], value.shape[3]
    scaling = dim**-0.5 if scaling is None else scaling
    if dim != value_dim:  # The kernels need equal numbers of channels. Zeros add nothing to scores and outputs.
        query, key, value = (functional.pad(x, (0, max(dim, value_dim) - x.shape[3])) for x in (query, key, value))
    out = attend(module, query, key, value, **_masks(attention_mask, key), dropout_p=dropout, scale=scaling)
    return out[..., :value_dim].transpose(1, 2), None


def _masks(mask: Tensor | None, key: Tensor) -> dict[str, Tensor]:
    """Return transformers' mask as the argument `mask` or `key_padding_mask` of `fused_masked_attention`."""
    if mask is None:
        return {}
    same_for_all = mask.dim() == 4 and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0)
    if same_for_all and mask.shape[0] == key.shape[0]:
        return {"key_padding_mask": _dropped(mask[:, 0, 0])}
    return {"mask": _dropped(mask)}


def _dropped(mask: Tensor) -> Tensor:
    """Return a mask, bool (True = kept) or floating point, as bool (True = dropped)."""
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(f"attention_mask must be bool or floating point, got {mask.dtype}")
    lowest = torch.finfo(mask.dtype).min
    rule = f"attention_mask must be bool (True = kept), or hold only 0 (kept) and {lowest:.3g} or -inf (dropped)"
    return dropped_entries(mask, lowest, rule)
