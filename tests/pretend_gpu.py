"""A pretend GPU that counts the operations for which the host would wait. Its tensors live on the CPU.

The host waits for an event, for a copy between host and device that is not asynchronous, for a value that it reads
from the device, and for an operator whose result's size depends on values on the device. On a GPU, such an operation
blocks the host until the queued work is done.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  registers its operators
from target import ROOT
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

aten = torch.ops.aten
# operators that read the size of their result, or the outcome of a check of their inputs, from the device
DATA_DEPENDENT = {
    aten.nonzero, aten.masked_select, aten.bincount, aten.multinomial, aten.equal, aten.is_nonzero, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten._local_scalar_dense, torch.ops.torchvision.nms,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
ON_BOTH = {*INDEXING, aten._to_copy, aten.copy_, aten._pack_padded_sequence, aten._pad_packed_sequence}


@functools.cache
def device() -> torch.device:
    """Return the device, which the first call registers with torch."""
    backend_registration._setup_privateuseone_for_python_backend("pretend")
    # Afterwards torch saves and restores the device's random state in this process, also in other tests.
    module: Any = torch.get_device_module("pretend")
    module.get_rng_state, module.set_rng_state = lambda *_: torch.get_rng_state(), lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # activation checkpointing enters the device's autocast
    # Two calls create tensors that no dispatch mode sees: `torch.tensor(numbers, device=...)` and indexing by a list.
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("copy_", _copy, "PrivateUse1")
    return torch.device("pretend", 0)


library = torch.library.Library("aten", "IMPL")
current: list[PretendGPU] = []  # the mode that is counting, if any


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    for mode in current:
        mode.wait("copy of numbers")
    target.held.copy_(source)
    return target


class PretendTensor(Tensor):
    """A tensor that claims to be on the device. Its numbers are in `held`, a tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> PretendTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=device(), **layout)
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"PretendTensor({self.held})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.numpy):  # torch refuses these for subclasses
            args = args[0].detach().cpu(), *args[1:]
        if function is torch.lstm:
            flat, spec = tree_flatten(args)
            return _LSTM.apply(spec, *flat)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def map_tensors(function: Any, value: Any) -> Any:
    """Apply the function to the tensors in an operator's argument or result. torch's pytree is far slower."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(function, each) for each in value])
    return value


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments."""
    found: list[Tensor] = []
    map_tensors(found.append, (*args, *kwargs.values()))
    return found


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the CPU, and return its result as a device would."""
    kwargs = dict(kwargs)
    ours = [tensor for tensor in tensors_of(args, kwargs) if isinstance(tensor, PretendTensor)]
    target = kwargs.get("device")
    onto = torch.device(target).type == "pretend" if target is not None else bool(ours)
    if not ours and not onto:
        return function(*args, **kwargs)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)

    def held(value: Any) -> Any:
        return map_tensors(lambda t: t.held if isinstance(t, PretendTensor) else t, value)

    out = function(*held(args), **{name: held(value) for name, value in kwargs.items()})
    if not onto:
        return out
    if function.overloadpacket is aten.copy_ and not isinstance(args[0], PretendTensor):
        return out
    if function.overloadpacket in (aten._pack_padded_sequence, aten._pad_packed_sequence):
        return PretendTensor(out[0]), out[1]  # batch sizes and lengths stay on the host
    wrappers = {id(tensor.held): tensor for tensor in ours}  # in-place operators return one of their arguments
    return map_tensors(lambda t: wrappers[id(t)] if id(t) in wrappers else PretendTensor(t), out)


class _LSTM(torch.autograd.Function):
    """torch's LSTM as one operator in the forward and one in the backward, as in cuDNN."""

    @staticmethod
    def forward(ctx: Any, spec: Any, *flat: Any) -> tuple[Tensor, ...]:
        held = [f.held.detach().requires_grad_() if isinstance(f, PretendTensor) else f for f in flat]
        with torch.enable_grad():
            ctx.outs = torch.lstm(*tree_unflatten(held, spec))
        ctx.held = held
        return tuple(PretendTensor(out.detach()) for out in ctx.outs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        wanted = [tensor for tensor in ctx.held if isinstance(tensor, Tensor) and tensor.requires_grad]
        found = iter(torch.autograd.grad(ctx.outs, wanted, [grad.held for grad in grads]))
        return None, *(
            PretendTensor(next(found)) if isinstance(t, Tensor) and t.requires_grad else None for t in ctx.held
        )


class PretendEvent:
    """A device event. Each time the host waits for it, a wait is counted."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "pretend"

    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        for mode in current:
            mode.wait("event")


class PretendGPU(TorchDispatchMode):
    """A dispatch mode that puts tensors on the device. While `counting` is true, it counts the operators and the waits.

    Attributes:
        calls: number of operators that ran on the device.
        waits: number of waits per line of code. `_place` chooses the line.
    """

    def __init__(self) -> None:
        super().__init__()
        device()
        self.counting = False
        self.calls, self.waits = 0, Counter[str]()

    def __enter__(self) -> PretendGPU:
        self.before = torch.Event, torch.autograd.is_multithreading_enabled()
        torch.Event = PretendEvent
        torch.autograd.set_multithreading_enabled(False)  # autograd's thread of a device would not have this mode
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.Event = self.before[0]
        torch.autograd.set_multithreading_enabled(self.before[1])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_of(args, kwargs)
        ours = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim()]
        packet = function.overloadpacket
        if ours and others and packet not in ON_BOTH:
            raise RuntimeError(f"{function}: tensors on the host and on the device")
        if self.counting:
            self.calls += bool(ours) or "pretend" in str(kwargs.get("device"))
            if why := self._why(packet, args, kwargs, ours):
                self.wait(why)
        return run(function, args, kwargs)

    def wait(self, why: str) -> None:
        """Count a wait at the current line."""
        self.waits[f"{_place()} {why}"] += 1

    def _why(self, packet: Any, args: Any, kwargs: Any, ours: list[Tensor]) -> str:
        """Return why the host would wait for this operator, or "" if it would not."""
        if packet in (aten._to_copy, aten.copy_):
            target = args[0].device if packet is aten.copy_ else torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if packet is aten.copy_ else args[0]
            crosses = (target.type == "pretend") != isinstance(source, PretendTensor)
            is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            # A number becomes an argument of a kernel, so it is not copied.
            is_number = packet is aten.copy_ and target.type == "pretend" and not source.dim()
            return f"copy to {target.type}" if crosses and not is_async and not is_number else ""
        if not ours:
            return ""
        if packet in INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "index by a mask"
            return "index by a tensor on the host" if any(i.device.type == "cpu" for i in indices) else ""
        if packet is aten.repeat_interleave:
            return "" if kwargs.get("output_size") is not None else "repeat_interleave"
        return packet.__name__ if packet in DATA_DEPENDENT else ""

    @contextmanager
    def count(self) -> Iterator[PretendGPU]:
        """Count within the context, starting from zero."""
        self.counting, self.calls, self.waits = True, 0, Counter()
        current.append(self)
        try:
            yield self
        finally:
            self.counting = False
            current.remove(self)


def _place() -> str:
    """Return the line of code for which a wait is counted.

    It is the first of these lines that exists:

    1. the innermost line in transformers or torchvision, among the four innermost lines;
    2. the innermost line in this package;
    3. the innermost line.
    """
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    frames = [f for f in frames if "torch/" not in f.filename and "contextlib" not in f.filename]
    own = [frame for frame in frames if str(ROOT / "sgalign") in frame.filename]
    library = [frame for frame in frames[-4:] if "transformers" in frame.filename or "torchvision" in frame.filename]
    frame = (library or own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
