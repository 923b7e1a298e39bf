"""The part "attention" of the GPU report: both branches, computed by this package and by its alternatives."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.measuring import DTYPES, Figures
from benchmarks.record import HARNESS, OURS, Record, digest, table_entries
from sgalign.ops.backends import BACKENDS

Contender = Callable[..., tuple[Tensor, ...]]
# B, H, Lq, Lk, D. Two goals refer to SGTR's shapes: 180 queries, with 100 entities or an image memory as keys.
SGTR_SHAPES = [(batch, 8, 180, keys, 32) for batch in (8, 4) for keys in (1024, 608, 475, 100)]
LONG_SHAPES = [(1, 8, 16384, 16384, 64), (1, 8, 4096, 4096, 64), (1, 8, 180, 16384, 32), (1, 8, 300, 2000, 32)]
LONG_SHAPES += [(2, 8, 128, 512, 64), (1, 8, 4096, 4096, 128)]
SHAPES = {  # most important first: the shapes that have goals
    "bfloat16": SGTR_SHAPES + LONG_SHAPES,
    "float16": [*SGTR_SHAPES[:2], *LONG_SHAPES[1:3]],
    "float32": [*SGTR_SHAPES[:4], *LONG_SHAPES[1:3]],
}
FLEX_SHAPES = [*SGTR_SHAPES[:4], *LONG_SHAPES[:3]]  # few, because compiling for a shape takes seconds
CHECKED_SHAPES = [(2, 3, 45, 300, 32), (1, 8, 1024, 300, 64), (1, 8, 1024, 300, 128)]  # with and without split keys


CODE = (*HARNESS, "benchmarks/attention_part.py", "benchmarks/test_attention.py")


def run(dtype: str, record: Record) -> None:
    """Check our backends, then time all contenders at many shapes, with and without the backward pass."""
    from benchmarks.test_attention import ours

    for backend in measuring.available():
        for kind in ours(backend):
            name = f"{backend} {kind}"
            depends = depends_on(name, dtype, True, [shape[-1] for shape in CHECKED_SHAPES])
            record.attempt(("checks", name), check, backend, kind, dtype, digest=depends)
    # FlexAttention comes after the others, because compiling it for every shape takes longer than all of them together.
    for backward, last, shape in itertools.product((True, False), (False, True), SHAPES[dtype]):
        row = record.row("rows", shape, dtype, backward, **work(shape, dtype, backward))
        for name in contenders_at(shape):
            if (name == "flex") == last:
                depends = depends_on(name, dtype, backward, shape[-1:])
                record.attempt((*row, name), timed, name, shape, dtype, backward, digest=depends)


def depends_on(name: str, dtype: str, backward: bool, channels: Sequence[int]) -> str:
    """Return a digest of everything that a contender's figures depend on, including Triton's table entries."""
    backend, _, kind = name.partition(" ")
    if backend not in BACKENDS:
        return digest(*CODE)
    entries = ""
    if backend == "triton":
        branches = 1 if kind.startswith("single") else 2
        entries = table_entries(8 * DTYPES[dtype].itemsize, channels, [branches], False, backward)
    return digest(*CODE, *OURS[backend], entries)


def contenders_at(shape: tuple[int, ...]) -> dict[str, Contender]:
    """Return the contenders at a shape: ours, PyTorch's, and those of other packages that are installed."""
    from benchmarks import test_attention as bench

    ours = {f"{name} {kind}": call for name in measuring.available() for kind, call in bench.ours(name).items()}
    theirs = {"sdpa twice": bench.sdpa_twice, "sdpa concatenated": bench.sdpa_concatenated, "eager": bench.eager}
    if shape in FLEX_SHAPES:
        theirs["flex"] = flex_attention()
    if importlib.util.find_spec("xformers"):
        theirs["xformers"] = xformers_twice
    if importlib.util.find_spec("flash_attn"):
        theirs["flash-attn, no mask"] = flash_twice
    return ours | theirs


def flex_attention() -> Callable[..., tuple[Tensor, ...]]:
    """Return compiled FlexAttention. Its mask is a hash of the indices and a seed, so no mask is stored."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    from benchmarks.test_attention import RATIO

    def both(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]

        def masked(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            x = (((b * heads + h) * queries + q) * keys + k) * -1640531527 + seed
            x = (x ^ (x >> 15)) * -2048144789
            x = (x ^ (x >> 13)) * -1028477387
            return torch.where(((x ^ (x >> 16)) & 0xFFFF) < round(65536 * RATIO), -float("inf"), score)

        return flex(query, key, value), flex(mirrored, key, value, score_mod=masked)

    compiled = torch.compile(both, dynamic=False)

    def run(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        seed = torch.randint(2**31 - 1, (), dtype=torch.int32, device=query.device)
        return compiled(query, mirrored, key, value, seed)

    return run


def xformers_twice(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return both branches computed by xFormers, with the random mask stored as a bias."""
    from xformers.ops import memory_efficient_attention

    from benchmarks.test_attention import random_kept

    q, m, k, v = (tensor.transpose(1, 2) for tensor in (query, mirrored, key, value))
    width = -(-key.shape[2] // 8) * 8  # xFormers needs aligned rows of the bias
    bias = query.new_zeros(*query.shape[:3], width)[..., : key.shape[2]]
    bias.masked_fill_(~random_kept(query, key), -torch.inf)  # in place, which keeps the row stride
    outs = memory_efficient_attention(q, k, v), memory_efficient_attention(m, k, v, attn_bias=bias)
    return tuple(out.transpose(1, 2) for out in outs)


def flash_twice(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Compute both branches with FlashAttention, which accepts no mask. The time is that of two unmasked branches."""
    from flash_attn import flash_attn_func

    q, m, k, v = (tensor.transpose(1, 2) for tensor in (query, mirrored, key, value))
    return flash_attn_func(q, k, v).transpose(1, 2), flash_attn_func(m, k, v).transpose(1, 2)


def timed(name: str, shape: tuple[int, ...], dtype: str, backward: bool) -> Figures:
    """Return a contender's figures, measured over so many sets of inputs that no cache holds them all."""
    from benchmarks import test_attention as bench

    torch._dynamo.reset()  # otherwise, Dynamo reaches its limit of compiled versions
    contender = contenders_at(shape)[name]
    torch.manual_seed(0)
    batch, heads, queries, keys, dim = shape
    sets = measuring.sets_beyond_cache(2 * batch * heads * (queries + keys) * dim * DTYPES[dtype].itemsize / 2**20)
    return measuring.timed(
        [
            measuring.differentiated(contender, bench.inputs(shape, backward, DTYPES[dtype], measuring.DEVICE))
            for _ in range(sets)
        ]
    )


def check(name: str, kind: str, dtype: str) -> Figures:
    """Compare a backend with the reference in float64 and return the figures of the worst shape."""
    from benchmarks import test_attention as bench

    def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        outs = list(bench.ours(backend, seed=3)[kind](*tensors))
        generator = torch.Generator().manual_seed(4)
        grads = [
            torch.randn(out.shape, generator=generator).to(measuring.DEVICE, DTYPES[dtype]).to(out) for out in outs
        ]
        return outs + measuring.gradients(outs, tensors, grads)

    def check_at(shape: tuple[int, ...]) -> Figures:
        torch.manual_seed(1)
        tensors = bench.inputs(shape, True, DTYPES[dtype], measuring.DEVICE)
        doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
        return measuring.checked(lambda: run(name, tensors), lambda: run("reference", doubles), dtype)

    return max(map(check_at, CHECKED_SHAPES), key=lambda found: (not found["right"], found["error"]))


def work(shape: tuple[int, ...], dtype: str, backward: bool) -> Figures:
    """Return the operations in the matrix products, and the bytes moved if every tensor is read or written once."""
    from benchmarks import test_attention as bench

    batch, heads, queries, keys, dim = shape
    rows = 4 * queries + 2 * keys  # two queries, two outputs, key and value
    if backward:
        rows += 6 * queries + 2 * keys + 2 * queries + 2 * keys  # reads all and the output gradients, writes gradients
    return {
        "flops": bench.flops(shape, backward),
        "bytes": batch * heads * rows * dim * DTYPES[dtype].itemsize,
    }
