"""Benchmarks of Motifs' relation head in both branches: ours, the usual form, and a cheaper equivalent in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, linear, logsigmoid

from benchmarks import conftest
from sgalign import dual_branch_relation_logits, fused_relation_logits, relation_alignment_loss

# R, N, C, K: one image and four images at the published sizes, and a small model on VRD
SHAPES = [(1024, 40, 4096, 51), (4096, 160, 4096, 51), (600, 100, 512, 71)]
HIDDEN = 512  # channels that the edge context gives for each end of a pair


class Head(nn.Module):
    """The inputs and weights of both branches: heads and tails `[N, HIDDEN]`, then post_cat, then rel_compress."""

    def __init__(self, shape: tuple[int, int, int, int], requires_grad: bool) -> None:
        super().__init__()
        relations, objects, channels, classes = shape
        self.register_buffer("pairs", torch.randint(objects, (relations, 2)))
        self.union = nn.Parameter(torch.randn(relations, channels))
        self.heads = nn.ParameterList(torch.randn(objects, HIDDEN) for _ in range(2))
        self.tails = nn.ParameterList(torch.randn(objects, HIDDEN) for _ in range(2))
        self.post_cat = nn.Linear(2 * HIDDEN, channels)
        self.rel_compress = nn.ModuleList(nn.Linear(channels, classes) for _ in range(2))
        self.requires_grad_(requires_grad)

    def usual(self) -> list[Tensor]:
        """Return the logits as Scene-Graph-Benchmark computes them, once per branch."""
        subject, object_ = self.pairs.unbind(1)
        return [
            rel_compress(self.post_cat(torch.cat([head[subject], tail[object_]], 1)) * self.union)
            for head, tail, rel_compress in zip(self.heads, self.tails, self.rel_compress)
        ]

    def ends(self) -> list[tuple[Tensor, Tensor]]:
        """Return the results of the two halves of post_cat, applied to N objects instead of R pairs."""
        as_subject, as_object = self.post_cat.weight.chunk(2, 1)
        return [
            (linear(head, as_subject, self.post_cat.bias), linear(tail, as_object))
            for head, tail in zip(self.heads, self.tails)
        ]

    def decomposed(self) -> list[Tensor]:
        subject, object_ = self.pairs.unbind(1)
        return [
            rel_compress((as_subject[subject] + as_object[object_]) * self.union)
            for (as_subject, as_object), rel_compress in zip(self.ends(), self.rel_compress)
        ]

    def ours_dual(self, backend: str | None = None) -> list[Tensor]:
        (subject, object_), (mirrored_subject, mirrored_object) = self.ends()
        own, mirrored = self.rel_compress
        return list(
            dual_branch_relation_logits(
                subject, object_, mirrored_subject, mirrored_object, self.union, self.pairs,
                own.weight, own.bias, mirrored.weight, mirrored.bias, backend=backend,
            )
        )  # fmt: skip

    def ours_single(self, backend: str | None = None) -> list[Tensor]:
        (subject, object_), _ = self.ends()
        head = self.rel_compress[0]
        arguments = subject, object_, self.union, self.pairs, head.weight, head.bias
        return [fused_relation_logits(*arguments, backend=backend)]


CONTENDERS: dict[str, Callable[[Head], list[Tensor]]] = {
    "sgalign dual": Head.ours_dual,
    "sgalign single": Head.ours_single,
    "usual form": Head.usual,
    "decomposed": Head.decomposed,
}


def flops(shape: tuple[int, ...], backward: bool, branches: int = 2) -> int:
    """Return the number of operations in the matrix products, including the halves of post_cat."""
    relations, objects, channels, classes = shape
    products = relations * classes + 2 * objects * HIDDEN  # products of C channels per branch
    return branches * (3 if backward else 1) * 2 * products * channels


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relation_head(benchmark, shape, backward, contender):
    torch.manual_seed(0)
    relations, _, _, classes = shape
    benchmark.group = f"relation head {shape} {'forward+backward' if backward else 'forward'}"
    conftest.flops[benchmark.group] = flops(shape, backward)
    head = Head(shape, backward).to(conftest.DEVICE)
    grad = torch.ones(relations, classes, device=conftest.DEVICE)

    def run() -> None:
        logits = CONTENDERS[contender](head)
        if backward:
            torch.autograd.backward(logits, [grad] * len(logits))

    conftest.measure(benchmark, contender, run)


# kind, direction, R, K. The first three are Motifs with one image and with four. The last two are SGTR with 8 images:
# its subjects or objects, and its predicates.
LOSSES = [
    ("softmax", "teacher_to_student", 1024, 51),
    ("softmax", "teacher_to_student", 4096, 51),
    ("softmax", "symmetric", 4096, 51),
    ("softmax", "teacher_to_student", 1440, 151),
    ("sigmoid", "teacher_to_student", 1440, 50),
]


def plain_loss(
    logits: Tensor, mirrored: Tensor, kind: str = "softmax", direction: str = "teacher_to_student"
) -> Tensor:
    """Return the alignment loss as one would write it in PyTorch."""

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        return kl_div(log_q, log_p, reduction="sum", log_target=True) / logits.numel()

    def log_probabilities(x: Tensor) -> list[Tensor]:
        return [x.log_softmax(1)] if kind == "softmax" else [logsigmoid(x), logsigmoid(-x)]

    teacher, student = log_probabilities(logits.detach()), log_probabilities(mirrored)
    loss = torch.stack([divergence(*both) for both in zip(teacher, student)]).sum()
    if direction == "symmetric":
        loss = (loss + torch.stack([divergence(*both) for both in zip(student, teacher)]).sum()) / 2
    return loss


@pytest.mark.parametrize("contender", ["sgalign", "plain PyTorch"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_alignment_loss(benchmark, case, contender):
    torch.manual_seed(0)
    kind, direction, *shape = case
    benchmark.group = f"loss {kind} {direction} {shape}"
    logits, mirrored = torch.randn(2, *shape, device=conftest.DEVICE)
    mirrored.requires_grad_()
    loss = relation_alignment_loss if contender == "sgalign" else plain_loss

    def run() -> None:
        mirrored.grad = None
        loss(logits, mirrored, kind=kind, direction=direction).backward()

    conftest.measure(benchmark, contender, run)
