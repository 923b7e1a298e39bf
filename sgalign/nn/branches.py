"""The attention of a module, alone or inside a mirror.

A mirror leaves a `Branches` on each attention module, which `attend` looks for. It is an attribute of the module, not a
global variable, so a mirror affects only the modules that it was made for. Threads and compiled code see it, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgalign.errors import InputError
from sgalign.ops.attention import dual_branch_attention, fused_masked_attention

_ATTRIBUTE = "_sgalign_branches"


@dataclass
class Step:
    """The state of one step's mirror, which all attention modules share."""

    ratio: float
    active: bool = False  # True inside the mirror's `with` block
    images: int | None = None  # size of the batch before it was doubled. None until then
    seed: Tensor | None = None  # int64 scalar. None until the batch is doubled, on whose device it is
    drew: bool = False  # True once an attention has applied the random mask


@dataclass(frozen=True)
class Branches:
    """How an attention module computes a batch of both branches, first the supervised half, then the mirrored half.

    Args:
        step: the state of the mirror.
        stream: the stream of the random mask, different for each attention module.
        masked: True or False if the user has chosen the masked modules. If None, the random mask is applied if both
            branches have the same keys, as in cross-attention to an image.
    """

    step: Step
    stream: int
    masked: bool | None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return `fused_masked_attention` of both halves. The mirrored half has the random mask."""
        images = self.step.images
        has_both = images is not None and query.shape[0] == 2 * images
        if not has_both or (key.shape[0] == query.shape[0] and not self.masked):
            return _alone(query, key, value, mask=mask, key_padding_mask=key_padding_mask, **options)
        assert self.step.seed is not None
        ratio = 0.0 if self.masked is False else self.step.ratio
        self.step.drew |= self.masked is not False
        options |= {"mask_seed": self.step.seed.to(query.device), "mask_stream": self.stream}
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())]
        queries, operands = query.chunk(2), (key, value, mask, key_padding_mask)
        if any(x is not None and x.shape[0] == query.shape[0] for x in operands):
            outs = [
                fused_masked_attention(q, *own[:2], mask=own[2], key_padding_mask=own[3], **options | {"mask_ratio": p})
                for q, p, own in zip(queries, (0.0, ratio), zip(*(_halves(x, query.shape[0]) for x in operands)))
            ]
        else:
            options |= {"mask": mask, "key_padding_mask": key_padding_mask, "mask_ratio": ratio}
            outs = list(dual_branch_attention(queries[0], queries[1], key, value, **options))
        # Joined in the order [B, L, H, D], in which the modules read the result. No other copy is then needed.
        return torch.cat([out.transpose(1, 2) for out in outs]).transpose(1, 2)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return the attention of `module`: `fused_masked_attention`, or inside a mirror, that of both branches.

    Args:
        module: the attention module that calls this function.
        query, key, value, options: as in `fused_masked_attention`.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: as in `fused_masked_attention`.
    """
    branches: Branches | None = getattr(module, _ATTRIBUTE, None)
    # A backward pass that fails leaves the attribute behind. It has no effect outside of backward passes.
    if branches is None or not (branches.step.active or torch._C._current_graph_task_id() >= 0):
        return _alone(query, key, value, **options)
    if options.get("mask_ratio"):
        raise InputError(
            f"mask_ratio of an attention module must be 0 inside a mirror, which has its own mask_ratio, got"
            f" {options['mask_ratio']}"
        )
    return branches.attend(query, key, value, **options)


def _alone(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if not torch.compiler.is_compiling() and query.shape[0] == 2 * key.shape[0] > 0:
        raise InputError(
            f"query must have the batch size of key, {key.shape[0]}, got {query.shape[0]}. The query may hold both"
            " branches only inside a mirror whose method `double` has doubled it. If the attention is computed again"
            " during the backward pass (activation checkpointing), the mirror's method `split` must have split the"
            " model's output"
        )
    return fused_masked_attention(query, key, value, **options)


def _halves(tensor: Tensor | None, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the operands of both branches. `batch` is the batch size of an operand that has both."""
    if tensor is None or tensor.shape[0] != batch:
        return tensor, tensor
    first, second = tensor.chunk(2)
    return first, second


def attach(modules: dict[nn.Module, Branches]) -> None:
    """Leave the `Branches` on their modules."""
    for module, branches in modules.items():
        setattr(module, _ATTRIBUTE, branches)


def detach(modules: dict[nn.Module, Branches]) -> None:
    """Remove the `Branches` from their modules, except where another mirror has replaced them."""
    for module, branches in modules.items():
        if module.__dict__.get(_ATTRIBUTE) is branches:
            delattr(module, _ATTRIBUTE)


def active_branches(module: nn.Module) -> Branches | None:
    """Return the `Branches` of a mirror whose `with` block is running, or None."""
    branches: Branches | None = getattr(module, _ATTRIBUTE, None)
    return branches if branches is not None and branches.step.active else None
