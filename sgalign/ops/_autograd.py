"""How the operations go through torch: autograd, its dispatcher where something listens there, and straight past it.

An eager call on ordinary tensors goes straight to the function that allocates and launches. torch.compile, export, fake
tensors, function transforms and profilers see the registered operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter


def is_plain(*tensors: Tensor | int | None) -> bool:
    """Return whether the dispatcher would pass a call on these tensors straight to its implementation.

    It does not for subclasses, sparse and nested tensors, and it does not while anything traces, fakes, transforms or
    records operations. Python's part of the dispatcher takes longer than all else of a small call.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    ):
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            if tensor.layout is not torch.strided or tensor.is_nested:  # type: ignore[union-attr]
                return False
        elif tensor is not None and kind is not int:
            return False
    return True


def call(function: type[torch.autograd.Function], plain: bool, *arguments: Any) -> Any:
    """Return what ``function.apply(plain, *arguments)`` returns first, in the cheapest way.

    Args:
        function: with a separate `setup_context`, as torch's function transforms need it. Its forward takes `plain`,
            and its `setup_context` returns the first outputs, into which gradients may flow.
        plain: as from `is_plain`.
        arguments: all after `plain`.
    """
    if not plain:
        return function.apply(False, *arguments)
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return _joined(function).apply(True, *arguments)
    return function.forward(True, *arguments)


@functools.cache
def _joined(function: Any) -> Any:
    """Return an autograd function that does the same, with `setup_context` in its forward.

    With a separate one torch inspects the signature of `forward` at each call, and all that the backward needs must be
    an output.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        return function.setup_context(ctx, inputs, function.forward(*inputs))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def differentiable_once(what: str, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Return `gradients`, which a backward pass calls, with an error instead of a gradient of its own.

    Args:
        what: the operation that `gradients` belongs to, as the error names it.
        gradients: called with positional arguments.
    """
    message = (
        f"sgalign: second-order gradients of {what} are not supported (create_graph=True, or a gradient of a gradient);"
        " backend='reference' has them"
    )

    class Gradients(torch.autograd.Function):
        forward = staticmethod(gradients)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(message)

    @functools.wraps(gradients)
    def once(*arguments: Any) -> Any:
        return Gradients.apply(*arguments) if torch.is_grad_enabled() else gradients(*arguments)

    return once


def distinct(tensors: list[Any]) -> list[Any]:
    """Replace repeated tensors by views, because torch.compile passes no tensor twice to an autograd function.

    None stays None.
    """
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if again else tensor)
    return found
