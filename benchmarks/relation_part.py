"""The GPU report's parts "relation" and "loss": Motifs' relation head and the alignment loss."""

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
from sgalign import relation_alignment_loss

SHAPES = [(1024, 40, 4096, 51), (4096, 160, 4096, 51)]  # R, N, C, K of one image and of four


def relation(before: Figures) -> Figures:
    """Time Motifs' relation head, post_cat's halves included."""
    from benchmarks import test_relation as bench

    contenders: dict[str, Callable[[bench.Head], list[Tensor]]] = {}
    for name in measuring.available():
        contenders[f"{name} dual"] = functools.partial(bench.Head.ours_dual, backend=name)
        contenders[f"{name} single"] = functools.partial(bench.Head.ours_single, backend=name)
    checked_before = before.get("checks", {})
    checks = {
        case: measuring.attempt(check_relation, contender, dtype, before=checked_before.get(case))
        for name, contender in contenders.items()
        for dtype in ("bfloat16", "float32")
        for case in [f"{name}, {dtype}"]
    }
    contenders |= {"usual form": bench.Head.usual, "decomposed": bench.Head.decomposed}
    rows = []
    for shape, dtype, backward in itertools.product(SHAPES, ("bfloat16", "float32"), (True, False)):
        known = measuring.known_contenders(before, shape, dtype, backward)
        measured = {
            name: measuring.attempt(time_relation, call, shape, dtype, backward, before=known.get(name))
            for name, call in contenders.items()
        }
        relations, objects, channels, classes = shape
        weights = (2 * bench.HIDDEN + 2 * classes) * channels
        elements = relations * channels + weights + 4 * objects * bench.HIDDEN + 2 * relations * classes
        elements *= 3 if backward else 1  # read again, and a gradient of each is written
        work = {"flops": bench.flops(shape, backward), "bytes": elements * DTYPES[dtype].itemsize}
        rows.append({"shape": shape, "dtype": dtype, "backward": backward, "contenders": measured} | work)
    return {"checks": checks, "rows": rows}


def time_relation(
    contender: Callable[[Any], list[Tensor]], shape: tuple[int, int, int, int], dtype: str, backward: bool
) -> Figures:
    """Return what is measured of a contender, with as many heads as no cache holds."""
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
    """Compare a contender with the usual form, the public code's, with the same numbers in float64."""
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


def loss(before: Figures) -> Figures:
    """Time the alignment loss with its gradient."""
    from benchmarks.test_relation import plain_loss

    shape = 4096, 51
    torch.manual_seed(0)
    logits, mirrored = torch.randn(2, *shape, device=measuring.DEVICE)
    contenders: dict[str, Callable[..., Tensor]] = {
        f"{name} loss": functools.partial(relation_alignment_loss, backend=name) for name in measuring.available()
    }

    def run(contender: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        teacher, student = (tensor.detach().requires_grad_() for tensor in given)
        value = contender(teacher, student)
        return [value, *torch.autograd.grad(value, student)]

    def check(contender: Callable[..., Tensor]) -> Figures:
        exact = functools.partial(relation_alignment_loss, backend="reference")
        doubles = logits.double(), mirrored.double()
        return measuring.checked(lambda: run(contender, logits, mirrored), lambda: run(exact, *doubles), "float32")

    def time_loss(contender: Callable[..., Tensor]) -> Figures:
        student = mirrored.detach().requires_grad_()
        return measuring.timed([measuring.differentiated(lambda student: (contender(logits, student),), [student])])

    checked_before, known = before.get("checks", {}), measuring.known_contenders(before, shape, "float32", True)
    checks = {
        name: measuring.attempt(check, contender, before=checked_before.get(name))
        for name, contender in contenders.items()
    }
    contenders["kl_div of log_softmax"] = plain_loss
    measured = {name: measuring.attempt(time_loss, call, before=known.get(name)) for name, call in contenders.items()}
    row = {"shape": shape, "dtype": "float32", "backward": True, "contenders": measured}
    return {"checks": checks, "rows": [row]}
