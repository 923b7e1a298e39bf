"""The definitions of the operations in plain PyTorch.

Every kernel is tested against them. They run on any device and in any dtype, and they are the default where no kernel
can run. Nothing here is fused or fast. The random mask is stored as a tensor. Autograd computes the gradients, so they
do not depend on the kernels' hand-written gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

LANES = 32  # neighboring keys in a group; they use the same 16 bits of the outputs of their Philox calls
GROUPS = 8  # groups in a chunk; a Philox call returns eight 16-bit numbers for 8 keys that are 32 apart
CHUNK = LANES * GROUPS
DROPOUT_STREAM_BIT = 1 << 31  # set in the streams of ordinary dropout, because it shares the seed of the random mask

_WORD = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor], rounds: int = 7) -> tuple[Tensor, ...]:
    """Return the random words of Philox4x32.

    The generator is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: four broadcastable int64 tensors that hold 32-bit words.
        key: two int64 tensors that hold 32-bit words.
        rounds: the number of rounds. 7 is the smallest number that passes BigCrush. The authors' default is 10.

    Returns:
        Four int64 tensors that hold 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words fills 64 bits, so int64 overflows. Masking with _WORD reads the bits as
        # unsigned.
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
    """Return the random mask that every backend draws, bit for bit.

    An entry depends only on the seed, the stream and its logical indices. Key ``k`` of query ``q`` is in lane
    ``k % 32`` of group ``k % 256 // 32`` of chunk ``k // 256``. One Philox call per (chunk, lane) gives eight 16-bit
    numbers, one per group. A key is dropped if its number is below `threshold`.

    Args:
        batch_heads: the number of heads in the batch, B * H. The third word of the counter is ``b * H + h``.
        queries, keys: the number of queries and keys.
        threshold: the drop probability times 65536, in [0, 65536].
        seed: the seed, an int64 scalar tensor. Its 64 bits are the generator's key.
        stream: a 32-bit word. Masks with the same seed and different streams are independent.
        device: the device of the mask.

    Returns:
        The mask, bool ``[batch_heads, queries, keys]``. True means dropped.
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
    # [BH, Lq, 8, chunks * 32] -> [BH, Lq, chunks, 8, 32], the order of the keys
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
    """Return softmax attention over the kept entries, ``[B, H, Lq, D]``.

    The definition is ``O = W V`` with the weights W of `attention_weights`.

    Args:
        value: the values, ``[B, H, Lk, D]``. The contents of ignored values have no effect.
        query, key, dropped, key_padding_mask, dropout_keep, dropout_scale, scale: as in `attention_weights`.
    """
    weights = attention_weights(
        query,
        key,
        dropped=dropped,
        key_padding_mask=key_padding_mask,
        dropout_keep=dropout_keep,
        dropout_scale=dropout_scale,
        scale=scale,
    )
    if key_padding_mask is not None:
        value = value.masked_fill(key_padding_mask[:, None, :, None], 0)
    return weights @ value


def attention_weights(
    query: Tensor,
    key: Tensor,
    *,
    dropped: Tensor | None,
    key_padding_mask: Tensor | None,
    dropout_keep: Tensor | None,
    dropout_scale: float,
    scale: float,
) -> Tensor:
    """Return the weights of softmax attention over the kept entries, ``[B, H, Lq, Lk]``.

    A row without any kept entry gives zeros. The definition is

        S = scale * Q K^T
        P = exp(S - max) / sum(exp(S - max)), over the kept entries
        W = P * dropout_keep * dropout_scale

    Args:
        query: the queries, ``[B, H, Lq, D]``.
        key: the keys, ``[B, H, Lk, D]``.
        dropped: the entries to drop, bool, broadcastable to ``[B, H, Lq, Lk]``. True means dropped.
        key_padding_mask: the padding among the keys, bool ``[B, Lk]``. True means ignored. The contents of ignored keys
            have no effect.
        dropout_keep: the entries that dropout keeps, bool ``[B, H, Lq, Lk]``. False sets a weight to zero after the
            softmax.
        dropout_scale: the factor of the weights that dropout keeps.
        scale: the factor of the scores.
    """
    if key_padding_mask is not None:
        key = key.masked_fill(key_padding_mask[:, None, :, None], 0)
        padding = key_padding_mask[:, None, None, :]
        dropped = padding if dropped is None else dropped | padding
    scores = (query * scale) @ key.transpose(-1, -2)
    if dropped is not None:
        scores = scores.masked_fill(dropped, -math.inf)
    # A column of -inf is added, because an empty row has no maximum. A branch for empty rows could not be traced if
    # torch.compile does not know the number of keys.
    top = functional.pad(scores.detach(), (0, 1), value=-math.inf).amax(dim=-1, keepdim=True)
    # The maximum of a row without any kept entry is -inf. Subtracting 0 instead makes its exponentials 0, not NaN.
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1)
    if dropout_keep is not None:
        weights = weights * dropout_keep * dropout_scale
    return weights


def relation_logits(
    subject: Tensor, object: Tensor, union: Tensor, pairs: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the predicate logits of each pair, ``[R, K]``.

    The definition is ``logits[r] = weight ((subject[s] + object[o]) * union[r]) + bias`` with ``s, o = pairs[r]``.

    Args:
        subject, object: the features of each of the N objects in the role of subject and of object, ``[N, C]``.
        union: the union features of each pair, ``[R, C]``.
        pairs: the indices of the subject and the object of each pair, int64 ``[R, 2]``.
        weight: the weight of the last layer, ``[K, C]``.
        bias: the bias of the last layer, ``[K]`` or None.
    """
    pair = subject[pairs[:, 0]] + object[pairs[:, 1]]
    return functional.linear(pair * union, weight, bias)


def alignment_divergence(logits: Tensor, mirrored_logits: Tensor, kind: str, direction: str) -> Tensor:
    """Return the divergence of each relation, ``[R]``, as `sgalign.relation_alignment_loss` defines it."""
    teacher, student = (_log_probabilities(x, kind) for x in (logits, mirrored_logits))
    if direction == "teacher_to_student":
        return _divergence(teacher, student)
    return (_divergence(teacher, student) + _divergence(student, teacher)) / 2


def _log_probabilities(logits: Tensor, kind: str) -> Tensor:
    """Return the log-probabilities of each relation.

    For "softmax" they are one distribution over K classes, ``[R, K, 1]``. For "sigmoid" they are K distributions over
    yes and no, ``[R, K, 2]``.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if kind == "softmax":
        return functional.log_softmax(logits, dim=1)[..., None]
    zero = logits.new_zeros(())  # torch cannot trace the gradient of logsigmoid if the number of relations is unknown
    return -torch.stack([torch.logaddexp(zero, -logits), torch.logaddexp(zero, logits)], dim=-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p, ratio = log_p.exp(), log_p - log_q
    # 0 * (-inf - x) would be NaN in the forward and in the backward pass.
    terms = p * ratio.masked_fill(p == 0, 0)
    # If only q is 0, the term is infinite, even if p was rounded to 0.
    return terms.masked_fill((p == 0) & (ratio == torch.inf), torch.inf).sum(dim=(1, 2))
