"""The operations' definitions in plain PyTorch: what every kernel is tested against, and a fallback on any device.

Nothing here is fused or fast. The random mask is materialised, and autograd differentiates the rest, so gradients are
independent of the kernels' hand-written ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LANES = 32  # neighbouring keys that share one 16-bit half of the Philox output words
GROUPS = 8  # halves in four 32-bit words: one call decides 8 keys that lie 32 apart
CHUNK = LANES * GROUPS
DROPOUT_STREAM_BIT = 1 << 31  # ordinary dropout draws from the same seed, in the streams above every mask's

_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 7) -> tuple[Tensor, ...]:
    """Return the words of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: four broadcastable int64 tensors holding 32-bit words.
        key: two int64 tensors holding 32-bit words.
        rounds: 7 is the fewest that pass BigCrush; 10 is the authors' default.

    Returns:
        Four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words fills 64 bits; int64 wraps, and the masks read its bits as unsigned.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def random_mask(
    batch_heads: int, queries: int, keys: int, *, threshold: int, seed: Tensor, stream: int, device: torch.device
) -> Tensor:
    """Return the random mask of every backend, bit for bit: a function of seed, stream and logical indices alone.

    Key ``k`` of query ``q`` lies in lane ``k % 32`` of group ``k % 256 // 32`` of chunk ``k // 256``. One Philox call
    per (chunk, lane) gives eight 16-bit numbers, one a group; a key is dropped where its number is below `threshold`.

    Args:
        batch_heads: B * H; the counter's third word is ``b * H + h``.
        threshold: drop probability times 65536, in [0, 65536].
        seed: int64 scalar tensor; its 64 bits are the generator's key.
        stream: 32-bit word that tells apart masks of one seed.

    Returns:
        bool ``[batch_heads, queries, keys]``, True = dropped.
    """
    chunks = -(-keys // CHUNK)
    column = torch.arange(chunks * LANES, device=device)
    query = torch.arange(queries, device=device)[:, None]
    batch_head = torch.arange(batch_heads, device=device)[:, None, None]
    seed = seed.to(device)
    words = philox4x32(
        (column, query, batch_head, torch.tensor(stream, device=device)), (seed & _WORD, seed >> 32 & _WORD)
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-2)
    # [BH, Lq, 8, chunks * 32] -> [BH, Lq, chunks, 8, 32], which is the order of the keys
    halves = halves.unflatten(-1, (chunks, LANES)).transpose(-3, -2).flatten(-3)
    return halves[..., :keys] < threshold


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropped: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_keep: Tensor | None,
    dropout_scale: float,
    scale: float,
) -> Tensor:
    """Return softmax attention over the entries that are kept; rows with nothing kept give zeros.

    ``S = scale * Q K^T;  P = exp(S - max) / sum(exp(S - max)) over kept entries;  O = (P * keep * dropout_scale) V``

    Args:
        query: ``[B, H, Lq, D]``; key, value: ``[B, H, Lk, D]``.
        dropped: bool, broadcastable to ``[B, H, Lq, Lk]``, True = dropped.
        key_padding_mask: bool ``[B, Lk]``, True = ignored; whatever such keys and values hold has no effect.
        dropout_keep: bool ``[B, H, Lq, Lk]``, False = zeroed after the softmax.
    """
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
        padding = padding.transpose(-1, -2)
        dropped = padding if dropped is None else dropped | padding
    scores = (query * scale) @ key.transpose(-1, -2)
    if dropped is not None:
        scores = scores.masked_fill(dropped, -math.inf)
    if key.shape[-2] == 0:
        return scores @ value  # sums of nothing: zeros, with zero gradients
    top = scores.detach().amax(dim=-1, keepdim=True)
    # A row with nothing kept has the maximum -inf: shifting it by 0 makes its exponentials 0 instead of NaN.
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    if dropout_keep is not None:
        weights = weights * dropout_keep * dropout_scale
    return weights @ value


def relation_logits(
    subject: Tensor, object: Tensor, union: Tensor, pairs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return ``logits[r] = weight ((subject[s] + object[o]) * union[r]) + bias`` with ``s, o = pairs[r]``: ``[R, K]``.

    Args:
        subject, object: ``[N, C]``; union: ``[R, C]``; pairs: int64 ``[R, 2]``; weight: ``[K, C]``; bias: ``[K]``.
    """
    pair = subject[pairs[:, 0]] + object[pairs[:, 1]]
    return functional.linear(pair * union, weight, bias)


def alignment_divergence(logits: Tensor, mirrored_logits: Tensor, kind: str, direction: str) -> Tensor:
    """Return the divergence of each relation's predictions, `[R]`, that `sgalign.relation_alignment_loss` defines."""
    teacher, student = (_log_probabilities(x, kind) for x in (logits, mirrored_logits))
    if direction == "teacher_to_student":
        return _divergence(teacher, student)
    return (_divergence(teacher, student) + _divergence(student, teacher)) / 2


def _log_probabilities(logits: Tensor, kind: str) -> Tensor:
    """Return ``[R, K, 1]`` of one distribution over K classes, or ``[R, K, 2]`` of K distributions over yes and no."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    if kind == "softmax":
        return functional.log_softmax(logits, dim=1)[..., None]
    return torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    # 0 * (-inf - x) would be NaN, forward and backward.
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(dim=(1, 2))
