"""The random mask in Triton, equal bit for bit to `sgalign.ops.reference.random_mask`."""

import math

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["queries", "keys", "stream", "threshold"])
def random_mask_kernel(out, seed, queries, keys, stream, threshold):
    """Write the 256 entries of one chunk of one row.

    The program indices are (batch_head * queries + query) and the chunk.
    """
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


def random_mask(out: Tensor, seed: Tensor, threshold: int, stream: int) -> None:
    """Write the random mask into `out`, a contiguous bool ``[B, H, Lq, Lk]``.

    True means dropped.
    """
    *batch_heads, queries, keys = out.shape
    if out.numel():
        grid = (math.prod(batch_heads) * queries, triton.cdiv(keys, 256))
        random_mask_kernel[grid](out, seed, queries, keys, stream, threshold, num_warps=1)
