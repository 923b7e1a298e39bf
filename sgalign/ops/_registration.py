"""The registration of the operations with torch: its dispatcher, its compiler and its counter of operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Operation(NamedTuple):
    """The functions of a registered operation. All take the arguments of its schema."""

    run: Callable[..., Any]  # computes the result
    fake: Callable[..., Any]  # returns tensors like the result, without computing them
    # Returns the number of floating-point operations in the matrix products. It gets shapes in place of tensors. None
    # if there are no matrix products.
    flops: Callable[..., int] | None


# These objects are attributes of torch's namespace, so they survive if sgalign is removed from sys.modules and imported
# again. torch does not accept a second definition of an operation.
_kept = vars(torch.ops.sgalign)
_library: torch.library.Library = _kept.setdefault("library", torch.library.Library("sgalign", "FRAGMENT"))
_operations: dict[str, Operation] = _kept.setdefault("operations", {})


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> None:
    """Register ``torch.ops.sgalign.NAME``, or replace the functions of an operation that is already registered.

    Args:
        schema: the name, the arguments and the results in torch's notation. Numbers that may change from step to step
            are SymInt or Scalar. torch.compile would compile again for each value of an int or a float.
        run, fake, flops: the functions in `Operation`.
    """
    name = schema.partition("(")[0]
    known = name in _operations
    _operations[name] = Operation(run, fake, flops)
    if not known:
        _library.define(schema)
        _library.impl(name, lambda *arguments: _operations[name].run(*arguments), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"sgalign::{name}", lambda *arguments: _operations[name].fake(*arguments), lib=_library
        )


def operation(name: str, plain: bool) -> Callable[..., Any]:
    """Return the function that runs an operation: its implementation if `plain`, otherwise the registered operation."""
    if plain:
        return _operations[name].run
    if not torch.compiler.is_compiling():
        _add_flop_formulas()
    return getattr(torch.ops.sgalign, name)


def _add_flop_formulas() -> None:
    """Add the formulas of all operations to torch's counters of floating-point operations.

    The formulas cannot be added when sgalign is imported, because torch.utils.flop_counter imports Triton. A counter
    copies torch's list of formulas when it is made, so the active counters also get the formulas.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None:
        return
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    counters = [mode.counter for mode in modes if isinstance(mode, flop_counter._FlopCounterMode)]
    for name, of_operation in _operations.items():
        packet = getattr(torch.ops.sgalign, name)
        if of_operation.flops and packet not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(packet)(of_operation.flops)
        for counter in counters:
            if packet in flop_counter.flop_registry:
                counter.flop_registry.setdefault(packet, flop_counter.flop_registry[packet])
