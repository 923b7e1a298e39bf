"""The parts "relation" and "loss" of the GPU report: Motifs' relation head and the alignment loss."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.measuring import DTYPES, Figures
from benchmarks.record import HARNESS, OURS, Record, digest
from sgalign import relation_alignment_loss

SHAPES = [(1024, 40, 4096, 51), (4096, 160, 4096, 51)]  # R, N, C, K for one image and for four
LOGITS = 4096, 51  # R, K


CODE = (*HARNESS, "benchmarks/relation_part.py", "benchmarks/test_relation.py")


def relation(record: Record) -> None:
    """Check and time Motifs' relation head, including the two linear layers that replace ``post_cat``."""
    from benchmarks import test_relation as bench

    contenders: dict[str, Callable[[bench.Head], list[Tensor]]] = {}
    for name in measuring.available():
        contenders[f"{name} dual"] = functools.partial(bench.Head.ours_dual, backend=name)
        contenders[f"{name} single"] = functools.partial(bench.Head.ours_single, backend=name)
    for (name, contender), dtype in itertools.product(contenders.items(), ("bfloat16", "float32")):
        record.attempt(("checks", f"{name}, {dtype}"), check_relation, contender, dtype, digest=depends_on(name))
    contenders |= {"usual form": bench.Head.usual, "decomposed": bench.Head.decomposed}
    for shape, dtype, backward in itertools.product(SHAPES, ("bfloat16", "float32"), (True, False)):
        relations, objects, channels, classes = shape
        weights = (2 * bench.HIDDEN + 2 * classes) * channels
        elements = relations * channels + weights + 4 * objects * bench.HIDDEN + 2 * relations * classes
        elements *= 3 if backward else 1  # the backward pass reads all of them and writes their gradients
        work = {"flops": bench.flops(shape, backward), "bytes": elements * DTYPES[dtype].itemsize}
        row = record.row("rows", shape, dtype, backward, **work)
        for name, call in contenders.items():
            record.attempt((*row, name), time_relation, call, shape, dtype, backward, digest=depends_on(name))


def depends_on(name: str) -> str:
    """Return a digest of everything that a contender's figures depend on."""
    return digest(*CODE, *OURS.get(name.split()[0], ()))


def time_relation(
    contender: Callable[[Any], list[Tensor]], shape: tuple[int, int, int, int], dtype: str, backward: bool
) -> Figures:
    """Return a contender's figures, measured over so many heads that no cache holds them all."""
    from benchmarks.test_relation import Head

    def call(head: Head) -> Callable[[], object]:
        wanted = [parameter for parameter in head.parameters() if parameter.requires_grad]
        return measuring.differentiated(lambda *_: contender(head), wanted)

    torch.manual_seed(0)
    heads = [Head(shape, backward).to(measuring.DEVICE, DTYPES[dtype])]
    mebibytes = sum(tensor.nbytes for tensor in heads[0].parameters()) / 2**20
    heads += [
        Head(shape, backward).to(measuring.DEVICE, DTYPES[dtype])
        for _ in range(measuring.sets_beyond_cache(mebibytes) - 1)
    ]
    return measuring.timed([call(head) for head in heads])


def check_relation(contender: Callable[[Any], list[Tensor]], dtype: str) -> Figures:
    """Compare a contender with the computation of the public code on the same inputs in float64."""
    from benchmarks.test_relation import Head

    torch.manual_seed(1)
    head = Head((100, 20, 512, 51), True).to(measuring.DEVICE, DTYPES[dtype])
    exact = copy.deepcopy(head).double()

    def run(compute: Callable[[Any], list[Tensor]], head: Head) -> list[Tensor]:
        logits = compute(head)
        generator = torch.Generator().manual_seed(2)
        grads = [torch.randn(out.shape, generator=generator).to(DTYPES[dtype]).to(out) for out in logits]
        return logits + measuring.gradients(logits, list(head.parameters()), grads)

    branches = len(contender(head))
    return measuring.checked(
        lambda: run(contender, head), lambda: run(lambda head: head.usual()[:branches], exact), dtype
    )


def loss(record: Record) -> None:
    """Check and time the alignment loss with its gradient."""
    from benchmarks.test_relation import plain_loss

    contenders: dict[str, Callable[..., Tensor]] = {
        f"{name} loss": functools.partial(relation_alignment_loss, backend=name) for name in measuring.available()
    }
    for name, contender in contenders.items():
        record.attempt(("checks", name), check_loss, contender, digest=depends_on(name))
    row = record.row("rows", LOGITS, "float32", True)
    for name, contender in (contenders | {"kl_div of log_softmax": plain_loss}).items():
        record.attempt((*row, name), time_loss, contender, digest=depends_on(name))


def branches() -> tuple[Tensor, Tensor]:
    """Return the logits of both branches. The mirrored logits require a gradient."""
    torch.manual_seed(0)
    logits, mirrored = torch.randn(2, *LOGITS, device=measuring.DEVICE)
    return logits, mirrored.requires_grad_()


def check_loss(contender: Callable[..., Tensor]) -> Figures:
    """Compare a contender with the reference in float64."""
    logits, mirrored = branches()

    def run(contender: Callable[..., Tensor], teacher: Tensor, given: Tensor) -> list[Tensor]:
        student = given.detach().requires_grad_()
        value = contender(teacher, student)
        return [value, *torch.autograd.grad(value, student)]

    exact = functools.partial(relation_alignment_loss, backend="reference")
    doubles = logits.double(), mirrored.double()
    return measuring.checked(lambda: run(contender, logits, mirrored), lambda: run(exact, *doubles), "float32")


def time_loss(contender: Callable[..., Tensor]) -> Figures:
    """Return a contender's figures."""
    logits, mirrored = branches()
    return measuring.timed([measuring.differentiated(lambda student: (contender(logits, student),), [mirrored])])
