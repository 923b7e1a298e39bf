"""Benchmarks of each operation beside PyTorch, on tensors of a few elements.

The computation takes almost no time. Calls of the GPU backends stop where the kernel would be launched. The time that
Python takes can therefore be measured without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import conftest
from benchmarks.test_relation import plain_loss
from sgalign import dual_branch_attention, dual_branch_relation_logits, relation_alignment_loss
from sgalign.ops import _core, _cuda, backends

pytestmark = pytest.mark.skipif(conftest.DEVICE.type != "cpu", reason="measures only the host")
Outputs = tuple[Tensor, ...]
PAIRS = torch.tensor([[0, 1], [1, 0], [0, 0]])
SEED = torch.tensor(5)  # fixed, because drawing a seed is another call of torch


def dual_attention(query: Tensor, mirrored_query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Outputs:
    if backend is None:
        return tuple(scaled_dot_product_attention(q, key, value) for q in (query, mirrored_query))
    return dual_branch_attention(query, mirrored_query, key, value, mask_ratio=0.1, mask_seed=SEED, backend=backend)


def relation_head(
    subject: Tensor, object: Tensor, mirrored_subject: Tensor, mirrored_object: Tensor, union: Tensor, weight: Tensor,
    bias: Tensor, backend: str | None,
) -> Outputs:  # fmt: skip
    ends = (subject, object), (mirrored_subject, mirrored_object)
    if backend is None:
        first, second = PAIRS.unbind(1)
        return tuple(torch.nn.functional.linear((s[first] + o[second]) * union, weight, bias) for s, o in ends)
    head = weight, bias
    return dual_branch_relation_logits(*ends[0], *ends[1], union, PAIRS, *head, *head, backend=backend)


def alignment_loss(logits: Tensor, mirrored: Tensor, backend: str | None) -> Outputs:
    if backend is None:
        return (plain_loss(logits, mirrored),)
    return (relation_alignment_loss(logits.detach(), mirrored, backend=backend),)


OPERATIONS: dict[str, tuple[Callable[..., Outputs], list[tuple[int, ...]]]] = {
    "dual attention": (dual_attention, [(1, 1, 2, 8)] * 4),
    "relation head": (relation_head, [(2, 4)] * 4 + [(3, 4), (5, 4), (5,)]),
    "alignment loss": (alignment_loss, [(3, 5)] * 2),
}


@contextlib.contextmanager
def launches_do_nothing() -> Iterator[None]:
    """Let the GPU backends run on the CPU up to each launch, which returns at once."""
    core = _core.load()
    described = {name: getattr(core, name) for name in ("Attention", "RelationLogits", "AlignmentLoss")}
    operations = ("attention_forward", "attention_backward", "relation_forward", "relation_backward", "alignment_loss")
    launches: dict[str, Any] = {f"cuda_{name}": lambda *_: None for name in operations}
    splits = {f"cuda_{name}_splits": lambda *_: 1 for name in ("attention", "relation")}
    stub = SimpleNamespace(**described, **launches, **splits)
    emulated = {
        name: backends.BACKENDS[name]._replace(problem=lambda: None, is_emulated=lambda: True)
        for name in backends.ON_GPU
    }
    with (
        mock.patch.dict(backends.BACKENDS, emulated),
        mock.patch.object(_cuda, "core", lambda device: stub),
        triton_compiles_nothing() if backends.HAS_TRITON else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def triton_compiles_nothing() -> Iterator[None]:
    """Let Triton assume an H100, and let it treat every kernel as already compiled to code that does nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    launched = SimpleNamespace(
        run=lambda *_: None, launch_metadata=lambda *_: None, function=None, packed_metadata=None
    )
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )

    def compiled(self: Any, key: str, signature: Any, device: int, *_: Any) -> SimpleNamespace:
        self.device_caches[device][0][key] = launched
        return launched

    with mock.patch.object(jit.JITFunction, "_do_compile", compiled), mock.patch.object(driver, "_active", device):
        yield


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_call(benchmark, operation, backward):
    """Time all backends in turn, on one thread."""
    call, shapes = OPERATIONS[operation]
    torch.manual_seed(0)
    operands = [torch.randn(shape, requires_grad=backward) for shape in shapes]
    gradients = [torch.ones_like(output) for output in call(*operands, None)]
    needed = operands[1:] if operation == "alignment loss" else operands  # the teacher gets no gradient

    def run(backend: str | None) -> None:
        outputs = call(*operands, backend)
        if backward:
            torch.autograd.grad(outputs, needed, gradients)

    names = {"PyTorch": None, "cpu": "cpu", "cuda, no launch": "cuda"}
    if backends.HAS_TRITON:
        names["triton, no launch"] = "triton"
    contenders = {name: lambda backend=backend: run(backend) for name, backend in names.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with launches_do_nothing():
            conftest.compare_calls(
                benchmark, f"{operation}, {'forward+backward' if backward else 'forward'}", contenders
            )
    finally:
        torch.set_num_threads(threads)
