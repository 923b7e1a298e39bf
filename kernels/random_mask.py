"""The random mask in Triton, bit for bit that of `sgalign.reference.random_mask`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["queries", "keys", "stream", "threshold"])
def random_mask_kernel(out, seed, queries, keys, stream, threshold):
    """Program (batch_head * queries + query, chunk) writes the 256 entries of one chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, 32)
    words = tl.philox(
        tl.load(seed),
        (chunk * 32 + lane).to(tl.uint32),
        (row % queries).to(tl.uint32),
        (row // queries).to(tl.uint32),
        stream.to(tl.uint32),
        n_rounds=7,
    )
    for group in tl.static_range(8):
        number = (words[group // 2] >> (16 * (group % 2))) & 0xFFFF
        key = chunk * 256 + group * 32 + lane
        tl.store(out + row * keys + key, number.to(tl.int32) < threshold, mask=key < keys)


def random_mask(batch_heads: int, queries: int, keys: int, *, threshold: int, seed: Tensor, stream: int) -> Tensor:
    """`sgalign.reference.random_mask` on the seed's device: bool ``[batch_heads, queries, keys]``, True = dropped."""
    out = torch.empty((batch_heads, queries, keys), dtype=torch.bool, device=seed.device)
    if out.numel():
        grid = (batch_heads * queries, triton.cdiv(keys, 256))
        random_mask_kernel[grid](out, seed, queries, keys, stream, threshold)
    return out
