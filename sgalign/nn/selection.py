"""The attention modules of a model that a mirror can mask, and the user's choice among them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sgalign.errors import InputError
from sgalign.nn.attention import MaskedMultiheadAttention
from sgalign.nn.branches import Branches, BranchState
from sgalign.nn.replace import matches
from sgalign.nn.transformers import uses_sgalign

Selector = str | type[nn.Module]  # name or class of attention modules


def find_attention(
    modules: Sequence[nn.Module], masked: tuple[Selector, ...] | None, state: BranchState
) -> dict[nn.Module, Branches]:
    """Return the `Branches` of the attention modules, or raise TypeError or InputError if there are none."""
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must be torch.nn.Module, got {type(module).__name__}")
    named = [(name, part) for module in modules for name, part in module.named_modules()]
    found: dict[nn.Module, str] = {}
    for name, part in named:
        if isinstance(part, MaskedMultiheadAttention) or (uses_sgalign(part) and _is_innermost(part)):
            found.setdefault(part, name)
    if not found:
        theirs = [name for name, part in named if isinstance(part, nn.MultiheadAttention)]
        advice = f"call sgalign.nn.replace_attention for {theirs}"
        if not theirs:
            advice = 'for a model of transformers, call model.set_attn_implementation("sgalign")'
        raise InputError(
            "modules must contain MaskedMultiheadAttention, or attention of transformers with"
            f' attn_implementation="sgalign", got neither: {advice}'
        )
    if masked is None:
        _refuse_deformable(named)
    for selector in masked or ():
        if not any(_is_selected(selector, name, part) for part, name in found.items()):
            raise InputError(f"masked must be among the attention modules {list(found.values())}, got {selector!r}")
    branches = {}
    for stream, (part, name) in enumerate(found.items()):
        chosen = None if masked is None else any(_is_selected(selector, name, part) for selector in masked)
        branches[part] = Branches(name, state, stream, chosen)
    return branches


def _is_innermost(module: nn.Module) -> bool:
    """Return True for attention modules of transformers, not for the layers and models around them."""
    return not any(uses_sgalign(part) for part in module.modules() if part is not module)


def _refuse_deformable(named: Sequence[tuple[str, nn.Module]]) -> None:
    for name, module in named:
        if "DeformableAttention" in type(module).__name__ or type(module).__name__ == "MSDeformAttn":
            raise InputError(
                f"modules must have dense attention, got {name!r} ({type(module).__name__}): it reads a few sampled"
                " points, so there is no attention matrix to mask. Mask rows of features with `mask_rows`, or choose"
                " other attention modules with `masked`"
            )


def selectors(masked: Selector | Sequence[Selector] | None) -> tuple[Selector, ...] | None:
    """Return `masked` as a tuple, or raise TypeError or InputError."""
    if masked is None:
        return None
    chosen = tuple(masked) if isinstance(masked, (list, tuple, set)) else (masked,)
    for selector in chosen:
        if not isinstance(selector, (str, type)):
            raise TypeError(f"masked must hold names and classes, got {type(selector).__name__}")
    if not chosen:
        raise InputError("masked must choose at least one attention module, got none")
    return chosen


def _is_selected(selector: Selector, name: str, module: nn.Module) -> bool:
    return matches(selector, name) if isinstance(selector, str) else isinstance(module, selector)
