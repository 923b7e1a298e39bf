"""The path of a call through torch's autograd and, if needed, its dispatcher.

An eager call on ordinary tensors skips the dispatcher and goes directly to the function that allocates the outputs and
launches the kernel. torch.compile, export, fake tensors, function transforms and profilers see the registered
operation.
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
    """Return True if the dispatcher would pass a call on these tensors directly to its implementation.

    If so, the caller can skip the dispatcher, whose Python part takes longer than the rest of a small call. The
    dispatcher is needed for subclasses, sparse tensors and nested tensors. It is also needed while operations are
    traced, transformed, profiled or run on fake tensors.
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


def is_transformed() -> bool:
    """Return True inside `torch.func.grad` and other function transforms, unless torch.compile traces them.

    They need a call of an autograd function. They cannot differentiate a registered operation.
    """
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def call(function: type[torch.autograd.Function], plain: bool, *arguments: Any) -> Any:
    """Run ``function.apply(plain, *arguments)`` in the cheapest way and return its outputs.

    The differentiable outputs come first. Callers must not use the others, because some paths leave them out.

    Args:
        function: an autograd function with a separate `setup_context`, which torch's function transforms need. Its
            forward takes `plain` first. Its `setup_context` returns the differentiable outputs.
        plain: the result of `is_plain`.
        arguments: the arguments of the forward after `plain`.
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
    """Return an equivalent autograd function that calls `setup_context` inside its forward.

    This avoids two costs of a separate `setup_context`. With one, torch inspects the signature of `forward` at each
    call, and every tensor that the backward pass needs must be an output.
    """

    def forward(ctx: Any, *inputs: Any) -> Any:
        return function.setup_context(ctx, inputs, function.forward(*inputs))

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


def differentiable_once(what: str, gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that computes gradients in a backward pass. Differentiating its result raises an error.

    Args:
        what: the name of the operation in the error messages.
        gradients: the function, which is called with positional arguments.
    """

    class Gradients(torch.autograd.Function):
        forward = staticmethod(gradients)
        backward = staticmethod(no_second_order(what))
        vmap = staticmethod(no_vmap(what))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

    @functools.wraps(gradients)
    def once(*arguments: Any) -> Any:
        try:
            return Gradients.apply(*arguments) if torch.is_grad_enabled() else gradients(*arguments)
        except RuntimeError:
            # With is_grads_batched=True, torch runs the backward on tensors that a kernel cannot read. This is checked
            # only after an error, because a check at every call would slow all calls.
            if not any(torch._C._functorch.is_legacy_batchedtensor(x) for x in arguments if isinstance(x, Tensor)):
                raise
        return Gradients.vmap()

    return once


def no_second_order(what: str) -> Callable[..., Any]:
    """Return the gradient of an operation's gradients, which raises an error. `what` names the operation in it."""
    return reference_only(f"second-order gradients of {what} (create_graph=True, or a gradient of a gradient)")


def no_vmap(what: str) -> Callable[..., Any]:
    """Return the vmap rule of an operation that has none. It raises an error, in which `what` names the operation."""
    return reference_only(f"vmap of {what} or of its gradients (jacrev, is_grads_batched=True)")


def reference_only(what: str) -> Callable[..., Any]:
    """Return a function that raises an error. The message says that only backend="reference" supports `what`."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError(f"sgalign: the kernels do not support {what}; backend='reference' supports it")

    return refuse
