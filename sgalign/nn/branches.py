"""The attention of a module, alone or inside a mirror.

A mirror stores a `Branches` in an attribute of each attention module. `attend` reads it. Because it is not a global
variable, a mirror affects only its own modules, and threads and compiled code see it, too.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from sgalign.errors import InputError
from sgalign.ops.attention import attention_weights, dual_branch_attention, fused_masked_attention

_OPEN = "_sgalign_branches"  # attribute of a module inside the `with` block of a mirror
_AGAIN = "_sgalign_branches_again"  # attribute of a module while the backward pass computes it again


@dataclass
class BranchState:
    """The state of a mirror that its attention modules share."""

    ratio: float  # drop probability of the random mask
    batch_size: int | None = None  # batch size before the doubling. None until then
    seed: Tensor | None = None  # int64 scalar. None until the doubling


@dataclass
class Branches:
    """The attention of a module inside a mirror. The first half of a doubled batch is supervised.

    Args:
        name: the name of the module.
        state: the state of the mirror.
        stream: the stream of the random mask, different for each attention module.
        masked: True or False if the user has chosen the masked modules. If None, the random mask is applied if both
            branches have the same keys, as in cross-attention to an image.
        ran: True once the module has run.
        drew: True once the module has applied the random mask.
    """

    name: str
    state: BranchState
    stream: int
    masked: bool | None
    ran: bool = False
    drew: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the module is outside of the mirror

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Return `fused_masked_attention` of both halves. The mirrored half has the random mask."""
        if not self._is_mirrored(query, key):
            return _alone(query, key, value, **options)
        options = self._with_seed(query, options)
        if _has_own(query, key, value, options):
            outs = [fused_masked_attention(q, k, v, **own) for q, k, v, own in _branches(query, key, value, options)]
        else:
            first, second = query.chunk(2)
            outs = list(dual_branch_attention(first, second, key, value, **options))
        # Joined in the order [B, L, H, D], in which the modules read the result. No other copy is then needed.
        return torch.cat([out.transpose(1, 2) for out in outs]).transpose(1, 2)

    def weights(self, query: Tensor, key: Tensor, **options: Any) -> Tensor:
        """Return the weights of `attend`."""
        if not self._is_mirrored(query, key):
            return attention_weights(query, key, **options)
        branches = _branches(query, key, key, self._with_seed(query, options))
        return torch.cat([attention_weights(q, k, **own) for q, k, _, own in branches])

    def _is_mirrored(self, query: Tensor, key: Tensor) -> bool:
        """Return True if the query is doubled, and the user has chosen this module or the keys are not doubled.

        This also sets `ran` and `drew`.
        """
        size = self.state.batch_size
        shares_keys = key.shape[0] != query.shape[0]
        mirrored = size is not None and query.shape[0] == 2 * size and (bool(self.masked) or shares_keys)
        # Set, but never read here. Compiled code would need another graph once a flag has changed.
        self.ran = True
        if mirrored and self.masked is not False:
            self.drew = True
        return mirrored

    def _with_seed(self, query: Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of an attention with the random mask of the mirrored branch."""
        if options.get("mask_ratio"):
            raise InputError(
                f"mask_ratio of an attention module must be 0 inside a mirror, which has its own mask_ratio, got"
                f" {options['mask_ratio']}"
            )
        assert self.state.seed is not None
        mask = options.get("mask")
        return options | {
            "mask": mask if mask is None else mask[(None,) * (4 - mask.dim())],
            "mask_ratio": 0.0 if self.masked is False else self.state.ratio,
            "mask_seed": self.state.seed.to(query.device),
            "mask_stream": self.stream,
        }


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Return the attention of `module`: `fused_masked_attention`, or inside a mirror, that of both branches.

    Args:
        module: the attention module that calls this function.
        query, key, value, options: as in `fused_masked_attention`.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: as in `fused_masked_attention`.
    """
    branches = branches_of(module)
    run = _alone if branches is None else branches.attend
    return run(query, key, value, **options)


def branches_of(module: nn.Module) -> Branches | None:
    """Return the `Branches` that an attention module must use, or None if it is outside of a mirror."""
    attributes = module.__dict__  # `getattr` takes 50 times as long to find that a module lacks an attribute
    again: Branches | None = attributes.get(_AGAIN)
    return attributes.get(_OPEN) if again is None else again


def enter(branches: dict[nn.Module, Branches]) -> None:
    """Store the `Branches` at the beginning of a `with` block.

    Raises:
        ValueError: if a module is inside another mirror.
    """
    for module, own in branches.items():
        if module.__dict__.get(_OPEN) is not None:
            raise InputError(f"modules must not be inside the `with` block of another mirror, got {own.name!r}")
    for module, own in branches.items():
        own.ran = own.drew = False
        setattr(module, _OPEN, own)


def leave(branches: dict[nn.Module, Branches]) -> None:
    """Remove the `Branches` at the end of a `with` block."""
    for module in branches:
        delattr(module, _OPEN)


def use_in_backward(branches: dict[nn.Module, Branches]) -> None:
    """Store the `Branches` until the running backward pass ends or fails.

    Activation checkpointing computes the modules again in the backward pass, when the `with` block may have ended.
    """

    def end() -> None:
        pass

    for module, own in branches.items():
        setattr(module, _AGAIN, own)
    # The engine keeps `end` until the backward pass ends or fails.
    weakref.finalize(end, _forget, weakref.WeakKeyDictionary(branches))
    torch.autograd.Variable._execution_engine.queue_callback(end)


def _forget(branches: weakref.WeakKeyDictionary[nn.Module, Branches]) -> None:
    for module, own in branches.items():
        if module.__dict__.get(_AGAIN) is own:  # not if the pass went on to the outputs of another mirror
            delattr(module, _AGAIN)


def _alone(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    if not torch.compiler.is_compiling() and query.shape[0] == 2 * key.shape[0] > 0:
        raise InputError(
            f"query must have the batch size of key, {key.shape[0]}, got {query.shape[0]}. Only `Mirror.double` may"
            " double the query, inside the mirror's `with` block. With activation checkpointing, split the model's"
            " output by `Mirror.split`"
        )
    return fused_masked_attention(query, key, value, **options)


def _has_own(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Return True if keys, an explicit mask or padding are also doubled, so one kernel call cannot serve both."""
    operands = key, value, options["mask"], options.get("key_padding_mask")
    return any(operand is not None and operand.shape[0] == query.shape[0] for operand in operands)


def _branches(
    query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Any]]]:
    """Yield query, key, value and options of each branch."""

    def halves(operand: Tensor | None) -> Iterable[Tensor | None]:
        has_both = operand is not None and operand.shape[0] == query.shape[0]
        return operand.chunk(2) if has_both else repeat(operand)  # type: ignore[union-attr]

    operands = map(halves, (query, key, value, options["mask"], options.get("key_padding_mask")))
    for ratio, (own_query, own_key, own_value, mask, padding) in zip((0.0, options["mask_ratio"]), zip(*operands)):
        assert own_query is not None and own_key is not None and own_value is not None
        own_options = options | {"mask": mask, "key_padding_mask": padding, "mask_ratio": ratio}
        yield own_query, own_key, own_value, own_options
