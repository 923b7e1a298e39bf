"""Small calls of every public operation, forward and backward, and wrong calls that must raise an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sgalign
from sgalign.nn import MaskedMultiheadAttention

Call = Callable[[int, torch.dtype, str | None], list[Tensor]]  # of a seed, a dtype and a backend

PAIRS = torch.tensor([[0, 1], [1, 0], [4, 2], [3, 3], [2, 4], [0, 4], [1, 3]])


def _drawn(seed: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Return random tensors that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def _with_gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs]),
    ]


def one_branch(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    query, key, value = inputs = _drawn(seed, dtype, (2, 2, 9, 8), (2, 2, 70, 8), (2, 2, 70, 8))
    options: Any = {"mask_ratio": 0.3, "mask_seed": seed, "dropout_p": 0.1, "backend": backend}
    return _with_gradients((sgalign.fused_masked_attention(query, key, value, **options),), inputs)


def both_branches(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    query, mirrored, key, value = inputs = _drawn(seed, dtype, *[(2, 2, 9, 8)] * 2, *[(2, 2, 70, 8)] * 2)
    padding = torch.arange(70).expand(2, 70) >= torch.tensor([[70], [50]])
    options: Any = {"mask_ratio": 0.3, "mask_seed": seed, "key_padding_mask": padding, "backend": backend}
    return _with_gradients(sgalign.dual_branch_attention(query, mirrored, key, value, **options), inputs)


def random_mask(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    return [sgalign.random_attention_mask(2, 2, 9, 300, ratio=0.3, seed=seed, stream=seed % 7)]


def alignment(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    logits, mirrored = inputs = _drawn(seed, dtype, (40, 21), (40, 21))
    kind: Any = ("softmax", "sigmoid")[seed % 2]
    loss = sgalign.relation_alignment_loss(logits, mirrored, kind=kind, backend=backend)
    return _with_gradients((loss,), inputs[1:])  # the supervised logits get no gradient


def relation(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    inputs = _drawn(seed, dtype, (5, 140), (5, 140), (7, 140), (21, 140), (21,))
    subject, object_, union, weight, bias = inputs
    logits = sgalign.fused_relation_logits(subject, object_, union, PAIRS, weight, bias, backend=backend)
    return _with_gradients((logits,), inputs)


def both_relations(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    inputs = _drawn(seed, dtype, *[(5, 140)] * 4, (7, 140), (21, 140), (21,), (21, 140), (21,))
    *ends, union, weight, bias, mirrored_weight, mirrored_bias = inputs
    logits = sgalign.dual_branch_relation_logits(
        *ends, union, PAIRS, weight, bias, mirrored_weight, mirrored_bias, backend=backend
    )
    return _with_gradients(logits, inputs)


def module(seed: int, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    """Call a new attention module in training and in evaluation mode, and return the results of the latter.

    In training mode, the random mask depends on torch's generator, which all threads share.
    """
    attention = MaskedMultiheadAttention(16, 2, batch_first=True, mask_ratio=0.2, backend=backend, dtype=dtype)
    for weight, drawn in zip(attention.parameters(), _drawn(seed, dtype, *(p.shape for p in attention.parameters()))):
        weight.data = drawn.data
    (x,) = _drawn(seed, dtype, (2, 11, 16))
    inputs = [x, *attention.parameters()]
    _with_gradients((attention(x, x, x)[0],), inputs)
    return _with_gradients((attention.eval()(x, x, x)[0],), inputs)


CALLS: dict[str, Call] = {
    "fused_masked_attention": one_branch,
    "dual_branch_attention": both_branches,
    "random_attention_mask": random_mask,
    "relation_alignment_loss": alignment,
    "fused_relation_logits": relation,
    "dual_branch_relation_logits": both_relations,
    "MaskedMultiheadAttention": module,
}


def _second_order(outputs: Tensor, x: Tensor) -> None:
    (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    gradient.sum().backward()


def wrong_attention() -> None:
    query, key = _drawn(0, torch.float32, (2, 2, 9, 8), (2, 2, 70, 7))
    sgalign.fused_masked_attention(query, key, key)


def wrong_ratio() -> None:
    query, key = _drawn(0, torch.float32, (2, 2, 9, 8), (2, 2, 70, 8))
    sgalign.dual_branch_attention(query, query, key, key, mask_ratio=1.5)


def twice_differentiated() -> None:
    query, key = _drawn(0, torch.float32, (2, 2, 9, 8), (2, 2, 70, 8))
    _second_order(sgalign.fused_masked_attention(query, key, key), query)


def wrong_mask() -> None:
    sgalign.random_attention_mask(2, 2, -1, 9, ratio=0.5, seed=0)


def wrong_logits() -> None:
    logits, mirrored = _drawn(0, torch.float32, (40, 21), (40, 20))
    sgalign.relation_alignment_loss(logits, mirrored)


def wrong_pairs() -> None:
    """Give the core a pair of objects that do not exist, which it refuses itself."""
    subject, object_, union, weight = _drawn(0, torch.float32, (4, 140), (4, 140), (7, 140), (21, 140))
    sgalign.fused_relation_logits(subject, object_, union, PAIRS, weight)


def twice_differentiated_relation() -> None:
    subject, object_, union, weight = _drawn(0, torch.float32, (5, 140), (5, 140), (7, 140), (21, 140))
    _second_order(sgalign.fused_relation_logits(subject, object_, union, PAIRS, weight), subject)


def wrong_module_input() -> None:
    (x,) = _drawn(0, torch.float32, (2, 11, 17))
    MaskedMultiheadAttention(16, 2, batch_first=True)(x, x, x)


WRONG_CALLS: dict[str, list[Callable[[], None]]] = {
    "fused_masked_attention": [wrong_attention, twice_differentiated],
    "dual_branch_attention": [wrong_ratio],
    "random_attention_mask": [wrong_mask],
    "relation_alignment_loss": [wrong_logits],
    "fused_relation_logits": [wrong_pairs, twice_differentiated_relation],
    "dual_branch_relation_logits": [wrong_pairs],
    "MaskedMultiheadAttention": [wrong_module_input],
}
