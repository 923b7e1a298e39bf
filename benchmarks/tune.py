"""Find the attention kernels' configurations on this machine's GPU: `python -m benchmarks.tune`.

For every kernel, size of elements, number of branches and of channels it starts from what kernels/configs.json says,
tries the neighbours of the best (half or twice a block, other warps, a stage more or less), drops those that do not fit
or that change the result, and moves on while one is faster. The table is written after each entry, so that a run that
is cut off loses nothing; `--kernels`, `--bits` and `--channels` choose a part.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from benchmarks.measuring import graph_ms, relative_error, usable
    from sgalign.files import written_whole
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.tune needs {error.name}: pip install '.[train,test]'")

DEVICE = torch.device("cuda")
KERNELS = ("forward", "query_gradient", "key_value_gradient")
CHANNELS = (32, 64, 128, 256)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
THRESHOLD = 6554  # of the random mask and of dropout, a tenth
SHAPES = [(8, 8, 180, 608), (2, 8, 2048, 2048)]  # B, H, Lq, Lk: SGTR's image memory, and one that fills the card
GAIN = 0.98  # what counts as faster: less is noise
TOLERANCE = {16: 3e-2, 32: 1e-4}  # of ||out - reference|| / ||reference||

LOST = "an illegal access has cost this process its device"  # what another process may find can be used


class Entry(NamedTuple):
    """A line's place in the table."""

    kernel: str
    bits: int
    branches: int
    channels: int
    dropout: bool

    @property
    def kind(self) -> str:
        from sgalign.kernels import configs

        return configs.kind(self.bits, self.branches, self.dropout)


Plan = tuple[int, int, int, int]  # as kernels.configs.Config: block_q, block_k, warps, stages


def neighbours(plan: Plan) -> Iterator[Plan]:
    """Yield the plans one step away in one direction; matrix units take no fewer than 16 rows."""
    block_q, block_k, warps, stages = plan
    for q, k in ((block_q // 2, block_k), (block_q * 2, block_k), (block_q, block_k // 2), (block_q, block_k * 2)):
        if min(q, k) >= 16 and max(q, k) <= 256:
            yield q, k, warps, stages
    for w in (warps // 2, warps * 2):
        if w in (2, 4, 8):
            yield block_q, block_k, w, stages
    for s in (stages - 1, stages + 1):
        if 1 <= s <= 4:
            yield block_q, block_k, warps, s


def climb(start: Plan, time: Callable[[list[Plan]], dict[Plan, float]]) -> tuple[Plan, float]:
    """Return the plan that no neighbour beats, and its time. `time` leaves out what cannot be used."""
    known = time([start])
    best, tried = start, {start}
    known.setdefault(start, math.inf)  # the table's own may not fit this card
    while True:
        new = [plan for plan in dict.fromkeys(neighbours(best)) if plan not in tried]
        tried.update(new)
        known |= time(new)
        fastest = min(known, key=lambda plan: known[plan])
        if fastest == best or known[fastest] > GAIN * known[best]:
            return best, known[best]
        best = fastest


def use(entry: Entry, plan: Plan) -> None:
    """Put a plan in the table that this process reads, not in its file."""
    from sgalign.kernels import configs

    table, name = configs.read_table(), configs.architecture(DEVICE)
    by_kind = table.setdefault(name, {}).setdefault(entry.kernel, {})
    by_dim = by_kind.get(entry.kind, {}) | {str(entry.channels): list(plan)}
    by_kind[entry.kind] = dict(sorted(by_dim.items(), key=lambda item: int(item[0])))
    configs.lookup.cache_clear()


@functools.lru_cache(len(SHAPES))
def operands(entry: Entry, shape: tuple[int, ...]) -> tuple[list[Tensor], ...]:
    """Return queries, key and value, and a gradient of each output."""
    batch, heads, queries, keys = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(length: int) -> Tensor:
        drawn = torch.randn(batch, heads, length, entry.channels, device=DEVICE, generator=generator)
        return drawn.to(DTYPES[entry.bits])

    return (
        [normal(queries) for _ in range(entry.branches)],
        [normal(keys), normal(keys)],
        [normal(queries) for _ in range(entry.branches)],
    )


def calls(entry: Entry, shape: tuple[int, ...]) -> tuple[Callable[[], object], list[Tensor]]:
    """Return what runs the kernel, a backward with both of its kernels, and where it writes."""
    from sgalign.kernels import attention
    from sgalign.ops import _cuda
    from sgalign.ops.attention import Options

    queries, (key, value), grad_outs = operands(entry, shape)
    seed = torch.tensor(1, device=DEVICE)
    options = Options(None, None, seed, THRESHOLD, THRESHOLD * entry.dropout, 0, entry.channels**-0.5)
    nan = functools.partial(torch.full_like, fill_value=float("nan"))  # shows what is not written
    outs = [nan(query) for query in queries]
    logsumexps = [nan(query[..., 0], dtype=torch.float32).contiguous() for query in queries]
    call = queries, key, value, outs, logsumexps, options, _cuda.multiprocessors(DEVICE)
    forward = functools.partial(attention.forward, *call)
    if entry.kernel == "forward":
        return forward, outs
    forward()
    grads = [nan(tensor) for tensor in (*queries, key, value)]
    return functools.partial(attention.backward, grad_outs, grads, *call), grads


def problem(entry: Entry, plan: Plan, table: Any) -> str | None:
    """Return why a plan cannot be used, beside what `table` has for other kernels.

    In a worker's process it leaves the compiled kernels in Triton's cache.
    """
    from sgalign.kernels import configs

    if not usable():
        return LOST
    try:
        configs.read_table().update(copy.deepcopy(table))
        use(entry, plan)
        for shape in SHAPES:
            run, _ = calls(entry, shape)
            run()
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def differs(entry: Entry, expected: list[Tensor]) -> bool:
    """Return whether the kernel's result is another than the reference's, or not a number."""
    run, found = calls(entry, SHAPES[0])
    run()
    return not relative_error(found, expected) <= TOLERANCE[entry.bits]  # NaN too


def times(entry: Entry, pool: Executor, expected: list[Tensor], plans: list[Plan]) -> dict[Plan, float]:
    """Return the milliseconds of the plans that can be used, the geometric mean of the shapes."""
    from sgalign.kernels import configs

    found = {}
    table = copy.deepcopy(configs.read_table())
    # All, before anything is timed on the same GPU.
    problems = list(pool.map(problem, itertools.repeat(entry), plans, itertools.repeat(table)))
    for plan, said in zip(plans, problems):
        said = (said if said != LOST else None) or problem(entry, plan, table)
        if said == LOST:
            raise RuntimeError(LOST)
        if not said:
            use(entry, plan)
            said = "another result" if differs(entry, expected) else None
        if said:
            print(f"  {plan}: {said}", flush=True)
            continue
        found[plan] = math.prod(graph_ms([calls(entry, shape)[0]]) for shape in SHAPES) ** (1 / len(SHAPES))
    return found


def reference_result(entry: Entry) -> list[Tensor]:
    """Return what `calls` writes at the first shape, by plain PyTorch in float64."""
    from sgalign import dual_branch_attention, fused_masked_attention

    queries, memory, grad_outs = operands(entry, SHAPES[0])
    tensors = [tensor.double().requires_grad_() for tensor in (*queries, *memory)]
    attend: Callable[..., Any] = fused_masked_attention if entry.branches == 1 else dual_branch_attention
    ratio = THRESHOLD / 65536
    outs = attend(*tensors, mask_ratio=ratio, mask_seed=1, dropout_p=ratio * entry.dropout, backend="reference")
    outs = [outs] if entry.branches == 1 else list(outs)
    if entry.kernel == "forward":
        return [out.detach() for out in outs]
    return list(torch.autograd.grad(outs, tensors, [grad.double() for grad in grad_outs]))


def tune(entries: list[Entry], pool: Executor) -> None:
    """Find the best plan of each entry, and write the table after each."""
    from sgalign.kernels import configs

    for entry in entries:
        name = configs.architecture(DEVICE)
        start = configs.lookup(entry.kernel, name, entry.bits, entry.channels, entry.branches, entry.dropout)
        print(f"{entry.kernel}, {entry.kind}, {entry.channels} channels, from {tuple(start)}", flush=True)
        try:
            best, taken = climb((*start,), functools.partial(times, entry, pool, reference_result(entry)))
        except RuntimeError:
            if usable():
                raise
            sys.exit(f"benchmarks.tune: {LOST}; the table has what came before")
        if math.isinf(taken):
            use(entry, (*start,))  # not what was tried last, which the next entry would write
            print("  nothing can be used", flush=True)
            continue
        use(entry, best)
        write_table(configs.TABLE)
        print(f"  {best}: {taken:.4f} ms", flush=True)


def write_table(file: Path) -> None:
    """Write the table that `kernels.configs` reads, a line for what one bits and branches have."""
    from sgalign.kernels import configs

    def members(entries: Iterable[tuple[str, str]], indent: str) -> str:
        body = ",\n".join(f"{indent} {json.dumps(key)}: {value}" for key, value in entries)
        return f"{{\n{body}\n{indent}}}"

    def kernels(sizes: dict[str, dict[str, list[int]]]) -> str:
        return members(((kind, json.dumps(by_dim)) for kind, by_dim in sizes.items()), "  ")

    architectures = (
        (name, members(((kernel, kernels(sizes)) for kernel, sizes in by_kernel.items()), " "))
        for name, by_kernel in configs.read_table().items()
    )
    with written_whole(file) as partial:
        partial.write_text(members(architectures, "") + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--channels", nargs="+", type=int, choices=CHANNELS, default=CHANNELS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no GPU here, so there is nothing to tune")
        return 0
    order = itertools.product(options.channels, options.bits, options.kernels, (2, 1))  # SGTR's own come first
    entries = [
        Entry(kernel, bits, branches, channels, dropout)
        for channels, bits, kernel, branches in order
        for dropout in ((False, True) if channels == 32 else (False,))  # which SGTR trains with
    ]
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tune(entries, pool)
    return 0


if __name__ == "__main__":
    sys.exit(main())
