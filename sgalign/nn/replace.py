"""The replacement of torch's multi-head attention in an existing model."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sgalign.errors import InputError
from sgalign.nn.attention import MaskedMultiheadAttention, OutputProjection
from sgalign.ops._attention_arguments import MAX_DIM


def replace_attention(module: nn.Module, *names: str) -> list[str]:
    """Turn `torch.nn.MultiheadAttention` modules into `MaskedMultiheadAttention`, in place.

    The modules stay the same Python objects, with the same parameters. An optimizer that holds the parameters goes on
    working. Hooks, dtypes, devices, modes and the names in the state dict stay as well. Modules that were replaced
    before are left as they are.

    A `torch.nn.TransformerEncoder` in `module` with a replaced attention gets ``use_nested_tensor = False``, because
    the kernels refuse the nested tensors that it would make of padded input.

    Args:
        module: the model, or any part of it. Pass the whole encoder, not its layers.
        names: the attention modules to replace. A name is an attribute, such as ``"multihead_attn"``, which stands for
            all modules of this name, or a full name within `module`, such as ``"layers.0.multihead_attn"``. Without
            names, all are replaced.

    Returns:
        The full names of the chosen modules, in the order of `module.named_modules()`. They are now
        `MaskedMultiheadAttention`.

    Raises:
        TypeError: if `module` is not a module.
        ValueError: if a name fits no attention module, or a module uses an option that `MaskedMultiheadAttention` does
            not support. Nothing is replaced then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    known = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, (nn.MultiheadAttention, MaskedMultiheadAttention))
    }
    listed = ", ".join(known) or "none"
    if not known:
        raise InputError(
            "module must contain a torch.nn.MultiheadAttention, got none. For a model of transformers, call"
            ' register_with_transformers() and model.set_attn_implementation("sgalign")'
        )
    for name in names:
        if not any(matches(name, found) for found in known):
            raise InputError(f"names must be among the attention modules ({listed}), got {name!r}")
    chosen = {found: part for found, part in known.items() if not names or any(matches(name, found) for name in names)}
    for found, part in chosen.items():
        if reason := _unsupported(part):
            raise InputError(f"module {found!r} cannot be replaced: {reason}")
    for part in chosen.values():
        if isinstance(part, nn.MultiheadAttention):
            # Setting the class keeps the object, which other modules, hooks and FSDP may refer to.
            part.__class__ = MaskedMultiheadAttention  # type: ignore[assignment]
            # The last one is True in torch's module, which lets torch's encoder layer bypass the module.
            part.__dict__.update(mask_ratio=0.0, backend=None, _qkv_same_embed_dim=False)
            # The `reset_parameters` of our output projection sets its bias to zero.
            if type(part.out_proj) is NonDynamicallyQuantizableLinear:
                part.out_proj.__class__ = OutputProjection  # type: ignore[assignment]
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(part in chosen.values() for part in encoder.modules()):
            encoder.use_nested_tensor = False
    return list(chosen)


def matches(name: str, full_name: str) -> bool:
    """Return True if `name` is a module's full name or the last part of it."""
    return full_name == name or full_name.rpartition(".")[2] == name


def _unsupported(attention: nn.Module) -> str | None:
    """Return the reason why an attention module cannot be replaced, or None."""
    if isinstance(attention, MaskedMultiheadAttention):
        return None
    assert isinstance(attention, nn.MultiheadAttention)
    if type(attention) is not nn.MultiheadAttention:
        return f"its class {type(attention).__name__} may compute something else than torch.nn.MultiheadAttention"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "add_bias_kv and add_zero_attn are not supported"
    if attention.head_dim > MAX_DIM:
        return f"the kernels support at most {MAX_DIM} channels per head, got {attention.head_dim}"
    return None
