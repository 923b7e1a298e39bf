"""The registration of the operations with torch: its dispatcher, its autograd, its compiler and its FLOP counter."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from sgalign.ops._autograd import no_vmap, reference_only


class Operation(NamedTuple):
    """The functions of a registered operation. All take the arguments of its schema."""

    run: Callable[..., Any]  # computes the result
    fake: Callable[..., Any]  # returns tensors like the result, without computing them
    # Computes the result by an autograd function, or raises an error. None if the operation has no gradients.
    differentiable: Callable[..., Any] | None
    # Counts the floating-point operations of the matrix products. Its arguments are shapes instead of tensors. None if
    # the operation has no matrix products.
    flops: Callable[..., int] | None


# These objects are attributes of torch's namespace, so they survive if sgalign is removed from sys.modules and imported
# again. torch does not accept a second definition of an operation.
_kept = vars(torch.ops.sgalign)
_library: torch.library.Library = _kept.setdefault("library", torch.library.Library("sgalign", "FRAGMENT"))
_operations: dict[str, Operation] = _kept.setdefault("operations", {})
_adding = threading.Lock()  # torch refuses a formula that another thread has just added


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Register ``torch.ops.sgalign.NAME``, or replace the functions of an operation that is already registered.

    Args:
        schema: the name, the arguments and the results in torch's notation. Numbers that may change from step to step
            are SymInt. torch.compile would compile again for each value of an int or a float.
        run, fake, differentiable, flops: the functions in `Operation`.
    """
    name = schema.partition("(")[0]
    known = name in _operations
    _operations[name] = Operation(run, fake, differentiable, flops)
    if not known:
        _library.define(schema)
        _library.impl(name, lambda *arguments: _operations[name].run(*arguments), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"sgalign::{name}", lambda *arguments: _operations[name].fake(*arguments), lib=_library
        )
        if differentiable:
            _library.impl(name, lambda *arguments: _with_autograd(name, arguments), "Autograd")
            _library.impl(name, no_vmap(name), "FuncTorchBatched")


def _with_autograd(name: str, arguments: tuple[Any, ...]) -> Any:
    """Run an operation for torch's dispatcher, by its autograd function if an argument has a gradient or a tangent.

    The forward of that function calls the operation again, with gradients and tangents disabled.
    """
    flat = (x for argument in arguments for x in (argument if isinstance(argument, list) else [argument]))
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    forward = torch._C._is_fwd_grad_enabled() and forward_ad._current_level >= 0
    if backward or (forward and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)):
        if torch._C._are_functorch_transforms_active():
            reference_only(f"torch.func transforms of {name} inside torch.compile")()
        return _operations[name].differentiable(*arguments)  # type: ignore[misc]
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.sgalign, name)(*arguments)


def operation(name: str, plain: bool) -> Callable[..., Any]:
    """Return the function that runs an operation: its implementation if `plain`, otherwise the registered operation."""
    if plain:
        return _operations[name].run
    if not torch.compiler.is_dynamo_compiling():
        add_flop_formulas()
    return getattr(torch.ops.sgalign, name)


def add_flop_formulas() -> None:
    """Add the formulas of all operations to torch's counters of floating-point operations.

    Importing torch.utils.flop_counter would import Triton, so this waits until the program has imported it. A counter
    copies torch's list of formulas when it is made, so the active counters also get the formulas.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    counters = [mode.counter for mode in modes if isinstance(mode, flop_counter._FlopCounterMode)]
    for name, of_operation in _operations.items():
        packet = getattr(torch.ops.sgalign, name)
        with _adding:
            if of_operation.flops and packet not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(packet)(of_operation.flops)
        for counter in counters:
            if packet in flop_counter.flop_registry:
                counter.flop_registry.setdefault(packet, flop_counter.flop_registry[packet])
