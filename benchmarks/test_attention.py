"""Benchmarks of attention in both branches: this package beside PyTorch. Every contender draws its own random mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import conftest
from sgalign import dual_branch_attention, fused_masked_attention
from sgalign.nn import MaskedMultiheadAttention

RATIO = 0.1
# B, H, Lq, Lk, D. The first shapes are those of SGTR. Its subject and object decoders have 100 entities as keys. Its
# predicate decoder has an image memory as keys: 475 positions for 600 x 800 pixels, 608 for 600 x 1000, and 1024 with
# padding. The last two shapes have a longer memory and a wider head.
SHAPES = [(batch, 8, 180, keys, 32) for batch in (4, 8) for keys in (100, 475, 608, 1024)]
SHAPES += [(1, 8, 300, 2000, 32), (2, 8, 128, 512, 64)]
Contender = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def random_kept(query: Tensor, key: Tensor) -> Tensor:
    return torch.rand(*query.shape[:3], key.shape[2], device=query.device) >= RATIO


def sdpa_twice(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    kept = random_kept(query, key)
    return (
        scaled_dot_product_attention(query, key, value),
        scaled_dot_product_attention(mirrored, key, value, attn_mask=kept),
    )


def sdpa_concatenated(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    kept = random_kept(query, key)
    both = torch.cat([query, mirrored], 2)
    out = scaled_dot_product_attention(both, key, value, attn_mask=torch.cat([torch.ones_like(kept), kept], 2))
    return out.split(query.shape[2], 2)


def eager(query: Tensor, mirrored: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    scale = query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scale
    mirrored_scores = mirrored @ key.transpose(-1, -2) * scale
    mirrored_scores = mirrored_scores.masked_fill(~random_kept(query, key), -torch.inf)
    return scores.softmax(-1) @ value, mirrored_scores.softmax(-1) @ value


compiled = torch.compile(eager)


def ours(backend: str | None = None, seed: int | None = None) -> dict[str, Contender]:
    """Return this package's contenders on one backend."""
    chosen: dict[str, Any] = {"backend": backend, "mask_seed": seed}
    dual = partial(dual_branch_attention, mask_ratio=RATIO, **chosen)
    single, masked = (partial(fused_masked_attention, mask_ratio=ratio, **chosen) for ratio in (0.0, RATIO))
    return {
        "dual": dual,
        "same query": lambda query, mirrored, key, value: dual(query, query, key, value),
        "single": lambda query, mirrored, key, value: (single(query, key, value),),
        "single, masked": lambda query, mirrored, key, value: (masked(query, key, value),),
    }


CONTENDERS: dict[str, Contender] = {
    **{f"sgalign {name}": contender for name, contender in ours().items()},
    "sdpa twice": sdpa_twice,
    "sdpa concatenated": sdpa_concatenated,
    "eager": eager,
    "compiled eager": compiled,
}
COMPILED_SHAPES = [(4, 8, 180, 100, 32), (8, 8, 180, 1024, 32)]  # few, because each takes most of a minute to compile


def inputs(
    shape: tuple[int, ...],
    requires_grad: bool,
    dtype: torch.dtype = torch.float32,
    device: torch.device = conftest.DEVICE,
) -> list[Tensor]:
    """Return the query, the mirrored query, the key and the value."""
    batch, heads, queries, keys, dim = shape
    kind: dict[str, Any] = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    return [torch.randn(batch, heads, length, dim, **kind) for length in (queries, queries, keys, keys)]


def flops(shape: tuple[int, ...], backward: bool, branches: int = 2) -> int:
    """Return the number of operations in the matrix products."""
    batch, heads, queries, keys, dim = shape
    products = (2 + 5) if backward else 2  # products of size Lq x Lk x D per branch
    return branches * products * 2 * batch * heads * queries * keys * dim


def step(contender: Contender, tensors: list[Tensor]) -> Callable[[], None]:
    """Return a function that runs one forward pass, and also the backward pass if the tensors require gradients."""
    grad = torch.ones_like(tensors[0])

    def run() -> None:
        outs = contender(*tensors)
        if tensors[0].requires_grad:
            torch.autograd.backward(outs, [grad] * len(outs), inputs=[t for t in tensors if t.requires_grad])

    return run


def test_sgemm(benchmark):
    """Measure the rate of torch's own matrix product, the unit of the table's last column."""
    benchmark.group = "sgemm 1024"
    matrix = torch.randn(1024, 1024, device=conftest.DEVICE)
    benchmark.pedantic(conftest.waited_for(lambda: torch.mm(matrix, matrix)), rounds=200, warmup_rounds=10)
    if benchmark.enabled:
        conftest.sgemm_rate.append(2 * 1024**3 / benchmark.stats.stats.min)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dual_branch(benchmark, shape, backward, contender):
    if contender == "compiled eager" and shape not in COMPILED_SHAPES:
        pytest.skip("compiled at two shapes only")
    torch.manual_seed(0)
    benchmark.group = f"{shape} {'forward+backward' if backward else 'forward'}"
    conftest.flops[benchmark.group] = flops(shape, backward)
    with torch.set_grad_enabled(backward):
        conftest.measure(benchmark, contender, step(CONTENDERS[contender], inputs(shape, backward)))


@pytest.mark.parametrize("contender", ["sgalign single", "sgalign single, masked"])
@pytest.mark.parametrize("dim", [32, 128])
def test_products_and_the_rest(benchmark, dim, contender):
    """Time two sizes of D. The time of the matrix products grows with D, but the time of softmax and mask does not."""
    torch.manual_seed(0)
    benchmark.group = f"one branch, D {dim}"
    with torch.no_grad():
        conftest.measure(benchmark, contender, step(CONTENDERS[contender], inputs((*conftest.SPLIT_SHAPE, dim), False)))


@pytest.mark.parametrize("contender", ["sgalign dual", "nn.MultiheadAttention"])
def test_module(benchmark, contender):
    """Time the whole module with its projections.

    Our module computes both branches in one call. torch's module is called twice, the second time with a freshly drawn
    mask.
    """
    torch.manual_seed(0)
    batch, queries, keys, embed, heads = 4, 180, 608, 256, 8
    benchmark.group = "module, B 4, Lq 180, Lk 608, forward+backward"
    with conftest.DEVICE:
        theirs = nn.MultiheadAttention(embed, heads, batch_first=True)
        ours = MaskedMultiheadAttention(embed, heads, batch_first=True, mask_ratio=RATIO)
        query, mirrored, memory = (torch.randn(batch, length, embed) for length in (queries, queries, keys))

    def run() -> None:
        if contender == "sgalign dual":
            outs = ours.dual_branch(query, mirrored, memory, memory)
        else:
            dropped = torch.rand(batch * heads, queries, keys, device=query.device) < RATIO
            outs = (
                theirs(query, memory, memory, need_weights=False)[0],
                theirs(mirrored, memory, memory, need_weights=False, attn_mask=dropped)[0],
            )
        torch.autograd.backward(outs, [torch.ones_like(query)] * 2)

    conftest.measure(benchmark, contender, run)


@pytest.mark.parametrize("contender", ["sgalign dual", "sdpa twice", "sdpa concatenated", "eager"])
def test_peak_memory(benchmark, contender):
    """Measure how much memory grows in one step: the resident set (Linux only), or torch's memory on a GPU."""
    shape = (8, 8, 180, 1024, 32)
    run = step(CONTENDERS[contender], inputs(shape, True))
    run()
    try:
        before, peak = conftest.memory(run)
    except OSError:
        pytest.skip("needs /proc/self/clear_refs to reset the kernel's record of the peak")
    benchmark.group = "peak memory"
    benchmark.pedantic(run, rounds=1)
    conftest.peak_memory[contender] = peak - before
