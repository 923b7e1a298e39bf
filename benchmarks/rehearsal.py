"""A rehearsal of the GPU commands on tiny inputs on the CPU.

It shows whether the commands run to the end, and measures nothing. torch's functions that query the GPU return invented
values. A fake CUDA graph runs its calls only while it is captured, and every fake event comes 20 ms after the one
before. Triton's own `do_bench_cudagraph` uses these fakes. The compiled core for the CPU takes the place of the
report's backends. The tuner's kernels run under Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from benchmarks import measuring
from benchmarks.record import Part, Record
from sgalign.ops import _core, backends

CARD = "no GPU (a rehearsal, so no figure comes from a GPU)"
PROPERTIES = types.SimpleNamespace(
    name=CARD, major=9, minor=0, multi_processor_count=4, total_memory=2**30, L2_cache_size=2**10
)


def nothing(*args: object, **options: object) -> None:
    """Do nothing, in place of a function that needs a device."""


class Event:
    """A fake CUDA event."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    record = nothing

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing and end.enable_timing
        return 20.0


class Stream:
    """A fake CUDA stream."""


class CUDAGraph:
    """A fake CUDA graph."""

    replay = nothing


FAKES: dict[str, Any] = {
    "is_available": lambda: True,
    "get_device_name": lambda device=None: CARD,
    "get_device_properties": lambda device: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "synchronize": nothing,
    "empty_cache": nothing,
    "Stream": Stream,
    "stream": contextlib.nullcontext,
    "Event": Event,
    "CUDAGraph": CUDAGraph,
    "graph": contextlib.nullcontext,
}


def install() -> None:
    """Make this process act as if it had a GPU, permanently."""
    if multiprocessing.parent_process() is None:  # printed once, not by every worker
        print(CARD, flush=True)
    mock.patch.multiple(torch.cuda, **FAKES).start()
    mock.patch.multiple(torch.cuda.profiler, start=nothing, stop=nothing).start()
    measuring.DEVICE = torch.device("cpu")
    measuring.CALL_SECONDS = 0.0
    measuring.results = lambda: measuring.ROOT / "runs" / "rehearsal"


def check_core(command: str) -> None:
    """Exit if the compiled core, which takes the place of the GPU kernels, cannot be used."""
    if (problem := _core.problem()) is not None:
        sys.exit(f"benchmarks.{command} --rehearse: {problem}")


def install_for_report() -> None:
    """Make this process act as if it had a GPU, and make the report's parts tiny."""
    check_core("gpu_report")
    install()
    # These are imported after the fakes are in place, because they choose devices and compile.
    from benchmarks import attention_part, device_tests, environment_part, relation_part, steps_part

    shapes = [(1, 2, 20, 40, 16), (1, 1, 8, 300, 32)]
    measuring.available = lambda: ["cpu"]
    environment_part.COPIED, environment_part.SIZES = 2**10, dict.fromkeys(measuring.DTYPES, 16)
    device_tests.TEST_FILES, device_tests.CHOSEN = ("tests/test_alignment.py",), ("-k", "mean_over or test_teacher")
    attention_part.SHAPES = dict.fromkeys(measuring.DTYPES, shapes)
    attention_part.FLEX_SHAPES, attention_part.CHECKED_SHAPES = shapes[:1], shapes
    relation_part.SHAPES, relation_part.LOGITS = [(30, 9, 64, 11)], (30, 11)
    attention_part.flex_attention = functools.partial(without_backward, attention_part.flex_attention)
    steps_part.WARM_UPS = steps_part.ROUNDS = 1
    steps_part.step = functools.partial(tiny_step, steps_part.step)
    torch.compile = lambda function, **options: function


def without_backward(flex_attention: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """Return FlexAttention with gradients of zero, because it has no backward on the CPU."""
    attend = flex_attention()

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        outs = attend(*(tensor.detach() for tensor in tensors))
        return [out + 0 * tensors[0] for out in outs]

    return run


def tiny_step(step: Callable[[str, str], Any], benchmark: str, of: str) -> Any:
    """Return the result of `step` for small models."""
    if benchmark == "test_sgtr":
        from benchmarks import test_sgtr
        from sgalign.models.entity_detector import EntityDetector
        from sgalign.models.sgtr import SGTR

        small: dict[str, Any] = {"layers": 1, "ffn_dim": 32}
        test_sgtr.SGTR = functools.partial(SGTR, encoder_layers=1, num_queries=12, **small)
        test_sgtr.EntityDetector = functools.partial(EntityDetector, backbone="resnet10", num_queries=10, **small)
        test_sgtr.IMAGE, test_sgtr.POSITIONS, test_sgtr.QUERIES, test_sgtr.ENTITIES = (64, 96), 24, 12, 10
    else:
        from benchmarks import test_training_step

        test_training_step.OBJECTS, test_training_step.PAIRS = 6, 12
        test_training_step.DIM, test_training_step.HIDDEN, test_training_step.REGION = 32, 16, 32
    return step(benchmark, of)


def install_for_profile() -> None:
    """Make this process act as if it had a GPU, and make the profiled shapes tiny."""
    check_core("profile")
    install()
    from benchmarks import profile

    measuring.available = lambda: ["cpu"]
    profile.SHAPES = [(1, 2, 20, 40, 32), (1, 2, 64, 64, 64)]


def install_for_tuner() -> None:
    """Make this process act as if it had a GPU, with Triton's interpreter, and make the tuner's shapes tiny."""
    if problem := backends.interpreter_problem():
        sys.exit(f"benchmarks.tune --rehearse: {problem}")
    os.environ["TRITON_INTERPRET"] = "1"
    install()
    from benchmarks import tune

    tune.DTYPES[16] = torch.float16  # the interpreter multiplies bfloat16 incorrectly
    tune.SHAPES = [(1, 1, 16, 20)]
    tune.neighbours = functools.partial(first, tune.neighbours)


def first(neighbours: Callable[[Any], Iterator[Any]], plan: Any) -> Iterator[Any]:
    """Yield the first neighbor of a plan."""
    return itertools.islice(neighbours(plan), 1)


def in_rehearsal(part: Part, record: Record) -> None:
    """Install the rehearsal in this process if that has not been done yet, and run a part of the report."""
    if measuring.DEVICE.type != "cpu":
        install_for_report()
    part(record)


def of_report() -> dict[str, Part]:
    """Return the report's parts for a rehearsal, with enough time for all of them."""
    install_for_report()
    from benchmarks import gpu_report

    gpu_report.SECONDS = dict.fromkeys(gpu_report.PARTS, 600)
    return {name: functools.partial(in_rehearsal, part) for name, part in gpu_report.PARTS.items()}
