"""Find the attention kernels' configurations on this machine's GPU: `python -m benchmarks.tune [--out DIR]`.

`--kernels`, `--bits` and `--channels` choose a part of the table. DIR/configs.json is kernels/configs.json with the
tuned entries. Copy it to kernels/configs.json, where the kernels read it. DIR/tuned.json has the times of all plans
that could be used. It is written after each entry of the table, and the same command resumes after the entries in it.

A plan consists of the block sizes, the number of warps, the number of pipeline stages and the register limit. For each
kernel, element size, number of branches and number of channels, the tuner starts from the plan in kernels/configs.json.
It tries the neighbors of the best plan. A neighbor has half or twice one block size, half or twice the warps, one
pipeline stage more or less, or another register limit. Plans that do not fit or that change the result are dropped. The
tuner moves to the fastest neighbor until none is faster.
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
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from benchmarks import measuring
    from benchmarks.measuring import ROOT, graph_ms, relative_error, usable
    from sgalign.files import check_writable, read_json, write_json, written_whole
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks.tune needs {error.name}: pip install '.[train,test]'")

KERNELS = ("forward", "query_gradient", "key_value_gradient")
CHANNELS = (32, 64, 128, 256)
DTYPES = {16: torch.bfloat16, 32: torch.float32}
RATIO = 6554 / 65536  # ratio of the random mask and of dropout, about a tenth
SHAPES = [(8, 8, 180, 608), (2, 8, 2048, 2048)]  # B, H, Lq, Lk: SGTR's image memory, and a shape that fills the card
GAIN = 0.98  # largest ratio of times that counts as faster, because smaller gains are noise
TOLERANCE = {16: 3e-2, 32: 1e-4}  # bits -> largest ||out - reference|| / ||reference||

# A problem of the process, not of the plan: another process may find that the plan can be used.
LOST = "this process lost its device to an illegal access"


class Entry(NamedTuple):
    """The keys of an entry in the table."""

    kernel: str
    bits: int
    branches: int
    channels: int
    dropout: bool

    @property
    def kind(self) -> str:
        from sgalign.kernels import configs

        return configs.kind(self.bits, self.branches, self.dropout)


Plan = tuple[int, int, int, int, int]  # as in kernels.configs.Config: block_q, block_k, warps, stages, registers
# Register limits: none, and those that leave room for 12 and for 16 warps. ROCm's compiler has no such option.
LIMITS = (0,) if torch.version.hip else (0, 168, 128)


def neighbours(plan: Plan) -> Iterator[Plan]:
    """Yield the plans that are one step away in one value. Matrix units take at least 16 rows."""
    block_q, block_k, warps, stages, registers = plan
    for q, k in ((block_q // 2, block_k), (block_q * 2, block_k), (block_q, block_k // 2), (block_q, block_k * 2)):
        if min(q, k) >= 16 and max(q, k) <= 256:
            yield q, k, warps, stages, registers
    for w in (warps // 2, warps * 2):
        if w in (2, 4, 8):
            yield block_q, block_k, w, stages, registers
    for s in (stages - 1, stages + 1):
        if 1 <= s <= 4:
            yield block_q, block_k, warps, s, registers
    for limit in LIMITS:
        if limit != registers:
            yield block_q, block_k, warps, stages, limit


def overhangs(kernel: str, plan: Plan, architecture: str) -> bool:
    """Return whether Triton assigns the warps more rows than a block has.

    The kernel would then read past the end of the block. Hopper's matrix units take 16 rows from each of four or eight
    warps. Triton 3.6 lays eight warps over 64 rows as if there were 128. An H200 then reported an illegal access in
    some kernels and none in others.
    """
    block_q, block_k, warps, *_ = plan
    rows = (block_q, block_k) if kernel == "key_value_gradient" else (block_q,)
    return architecture == "sm_90" and any(64 <= count < 16 * warps for count in rows)


def climb(start: Plan, time: Callable[[list[Plan]], dict[Plan, float]]) -> tuple[Plan, dict[Plan, float]]:
    """Return the plan that no neighbor beats, and the times of all plans that were tried.

    `time` leaves out plans that cannot be used.
    """
    known = time([start])
    best, tried = start, {start}
    known.setdefault(start, math.inf)  # the table's own plan may not fit this card
    while True:
        new = [plan for plan in dict.fromkeys(neighbours(best)) if plan not in tried]
        tried.update(new)
        known |= time(new)
        fastest = min(known, key=lambda plan: known[plan])
        if fastest == best or known[fastest] > GAIN * known[best]:
            return best, known
        best = fastest


def use(entry: Entry, plan: Plan) -> None:
    """Put a plan into the table in this process, but not into its file."""
    from sgalign.kernels import configs

    table, name = configs.read_table(), configs.architecture(measuring.DEVICE)
    by_kind = table.setdefault(name, {}).setdefault(entry.kernel, {})
    by_dim = by_kind.get(entry.kind, {}) | {str(entry.channels): list(plan if plan[-1] else plan[:-1])}
    by_kind[entry.kind] = dict(sorted(by_dim.items(), key=lambda item: int(item[0])))
    configs.lookup.cache_clear()


@functools.lru_cache(len(SHAPES))
def operands(entry: Entry, shape: tuple[int, ...]) -> tuple[list[Tensor], ...]:
    """Return the queries, the key and value, and a gradient for each output."""
    batch, heads, queries, keys = shape
    generator = torch.Generator(measuring.DEVICE).manual_seed(0)

    def normal(length: int) -> Tensor:
        drawn = torch.randn(batch, heads, length, entry.channels, device=measuring.DEVICE, generator=generator)
        return drawn.to(DTYPES[entry.bits])

    return (
        [normal(queries) for _ in range(entry.branches)],
        [normal(keys), normal(keys)],
        [normal(queries) for _ in range(entry.branches)],
    )


def calls(entry: Entry, shape: tuple[int, ...]) -> tuple[Callable[[], object], list[Tensor]]:
    """Return a function that runs the kernel, and the tensors that it writes. A backward runs both of its kernels."""
    from sgalign.kernels import attention
    from sgalign.ops import _cuda
    from sgalign.ops._attention_arguments import Options

    queries, (key, value), grad_outs = operands(entry, shape)
    seed = torch.tensor(1, device=measuring.DEVICE)
    options = Options(None, None, seed, RATIO, RATIO * entry.dropout, 0, entry.channels**-0.5)
    nan = functools.partial(torch.full_like, fill_value=float("nan"))  # exposes elements that are not written
    outs = [nan(query) for query in queries]
    logsumexps = [nan(query[..., 0], dtype=torch.float32).contiguous() for query in queries]
    call = queries, key, value, outs, logsumexps, options, _cuda.multiprocessors(measuring.DEVICE)
    forward = functools.partial(attention.forward, *call)
    if entry.kernel == "forward":
        return forward, outs
    forward()
    grads = [nan(tensor) for tensor in (*queries, key, value)]
    return functools.partial(attention.backward, grad_outs, grads, *call), grads


def problem(entry: Entry, plan: Plan, table: Any) -> str | None:
    """Return the reason why a plan cannot be used, or None if it can. The other kernels use their plans in `table`.

    In a worker process, this leaves the compiled kernels in Triton's cache.
    """
    from sgalign.kernels import configs

    if not usable():
        return LOST
    if overhangs(entry.kernel, plan, configs.architecture(measuring.DEVICE)):
        return "its warps have more rows than its blocks"
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


def start_worker(prepare: Callable[[], None] | None) -> None:
    """Prepare a worker process. It ends with its parent and ignores ctrl-C, which the parent handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    measuring.end_with_parent()
    if prepare is not None:
        prepare()


def differs(entry: Entry, expected: list[Tensor]) -> bool:
    """Return whether the kernel's result differs from the reference's or is NaN."""
    run, found = calls(entry, SHAPES[0])
    run()
    return not relative_error(found, expected) <= TOLERANCE[entry.bits]  # true for NaN, too


def times(entry: Entry, pool: Executor, expected: list[Tensor], plans: list[Plan]) -> dict[Plan, float]:
    """Return the milliseconds of each plan that can be used, as the geometric mean over the shapes."""
    from sgalign.kernels import configs

    found = {}
    table = copy.deepcopy(configs.read_table())
    # All plans are tried out before any is timed, because both happen on the same GPU.
    problems = list(pool.map(problem, itertools.repeat(entry), plans, itertools.repeat(table)))
    for plan, said in zip(plans, problems):
        said = (said if said != LOST else None) or problem(entry, plan, table)
        if said == LOST:
            raise RuntimeError(LOST)
        if not said:
            use(entry, plan)
            said = "its result differs from the reference" if differs(entry, expected) else None
        if said:
            print(f"  {plan}: {said}", flush=True)
            continue
        found[plan] = math.prod(graph_ms([calls(entry, shape)[0]]) for shape in SHAPES) ** (1 / len(SHAPES))
    return found


def reference_result(entry: Entry) -> list[Tensor]:
    """Return the tensors that `calls` should write at the first shape, from plain PyTorch in float64."""
    from sgalign import dual_branch_attention, fused_masked_attention

    queries, memory, grad_outs = operands(entry, SHAPES[0])
    tensors = [tensor.double().requires_grad_() for tensor in (*queries, *memory)]
    attend: Callable[..., Any] = fused_masked_attention if entry.branches == 1 else dual_branch_attention
    outs = attend(*tensors, mask_ratio=RATIO, mask_seed=1, dropout_p=RATIO * entry.dropout, backend="reference")
    outs = [outs] if entry.branches == 1 else list(outs)
    if entry.kernel == "forward":
        return [out.detach() for out in outs]
    return list(torch.autograd.grad(outs, tensors, [grad.double() for grad in grad_outs]))


Tuned = dict[Entry, dict[str, Any]]  # the best "plan", and "ms" of all plans that could be used, in order of trying


def tune(entries: list[Entry], pool: Executor, out: Path, tuned: Tuned) -> None:
    """Find the best plan of each entry and add it to `tuned`. Write `tuned` and the table after each entry."""
    from sgalign.kernels import configs

    for entry in entries:
        name = configs.architecture(measuring.DEVICE)
        start = configs.lookup(entry.kernel, name, entry.bits, entry.channels, entry.branches, entry.dropout)
        print(f"{entry.kernel}, {entry.kind}, {entry.channels} channels, from {tuple(start)}", flush=True)
        try:
            best, known = climb((*start,), functools.partial(times, entry, pool, reference_result(entry)))
        except RuntimeError:
            if usable():
                raise
            sys.exit(f"benchmarks.tune: {LOST}; {measuring.kept(out / 'tuned.json')}")
        use(entry, best)  # until here, the table holds the plan that was tried last
        if math.isinf(known[best]):
            print("  no plan can be used", flush=True)
            continue
        print(f"  {best}: {known[best]:.4f} ms", flush=True)
        ms = {", ".join(map(str, plan)): time for plan, time in known.items() if not math.isinf(time)}
        tuned[entry] = {"plan": best, "ms": ms}
        of = {"card": torch.cuda.get_device_name(), "float32": configs.dot_precision()}
        write_json(out / "tuned.json", of | {"entries": as_lines(tuned)}, indent=1)
        write_table(out / "configs.json")


def as_lines(tuned: Tuned) -> list[dict[str, Any]]:
    """Return the tuned entries in a form that JSON can hold."""
    return [entry._asdict() | found for entry, found in tuned.items()]


def read_tuned(file: Path) -> Tuned:
    """Return the entries that were tuned on this card, and put their plans into the table in this process.

    Raises:
        ValueError: if the file was written on another card or not by this command.
    """
    from sgalign.kernels import configs

    remedy = "remove it, or give another --out"
    if not file.exists():
        return {}
    content = read_json(file, remedy)
    try:
        card, lines = content["card"], content["entries"]
        tuned = {Entry(*(line[field] for field in Entry._fields)): line for line in lines}
        plans = {entry: configs.Config(*line["plan"]) for entry, line in tuned.items()}
        for plan in plans.values():
            configs.check_config(plan)
        if content.get("float32", configs.dot_precision()) != configs.dot_precision():
            raise ValueError(
                f"its float32 products used {content['float32']}, but the present setting is {configs.dot_precision()}"
            )
        for entry, line in tuned.items():
            fields = (
                (entry.kernel, KERNELS),
                (entry.bits, DTYPES),
                (entry.branches, (1, 2)),
                (entry.channels, CHANNELS),
            )
            known = all(type(field) in (int, str) and field in values for field, values in fields)
            if not known or type(entry.dropout) is not bool or not isinstance(line["ms"], dict):
                raise ValueError(f"the table has no such entry: {line}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a record that can be resumed ({error}); {remedy}") from error
    if card != torch.cuda.get_device_name():
        raise ValueError(f"{file} was measured on {card}, but this card is {torch.cuda.get_device_name()}; {remedy}")
    for entry, plan in plans.items():
        use(entry, plan)
    return tuned


def write_table(file: Path) -> None:
    """Write the table that `kernels.configs` reads, with one line per kind of entry."""
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
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<card>)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--bits", nargs="+", type=int, choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--channels", nargs="+", type=int, choices=CHANNELS, help="default: all, or 32 in a rehearsal")
    parser.add_argument("--again", action="store_true", help="also tune the entries that tuned.json already has")
    parser.add_argument(
        "--rehearse", action="store_true", help="run everything on tiny inputs without a GPU; the figures mean nothing"
    )
    options = parser.parse_args(arguments)
    prepare = None
    if options.rehearse:
        from benchmarks import rehearsal

        prepare = rehearsal.install_for_tuner
        prepare()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune: torch finds no GPU here, so there is nothing to tune; --rehearse runs without one")
    out = options.out or measuring.results()
    all_channels = CHANNELS[:1] if options.rehearse else CHANNELS
    # The most important entries come first: 16 bits, both branches and SGTR's channels.
    order = itertools.product(options.bits, (False, True), (2, 1), options.channels or all_channels, options.kernels)
    entries = [
        Entry(kernel, bits, branches, channels, dropout)
        for bits, dropout, branches, channels, kernel in order
        if channels == 32 or not dropout  # SGTR trains with dropout at 32 channels
    ]
    try:
        measuring.check_environment()
        for file in ("tuned.json", "configs.json"):
            check_writable(out / file)
        tuned = read_tuned(out / "tuned.json")
        left = [entry for entry in entries if options.again or entry not in tuned]
        workers = min(8, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (prepare,)) as pool:
            tune(left, pool, out, tuned)
        write_table(out / "configs.json")  # also if nothing was left to tune
    except KeyboardInterrupt:
        sys.exit(f"benchmarks.tune: interrupted; {measuring.kept(out / 'tuned.json')}")
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks.tune: {error}")
    print(f"wrote {out / 'configs.json'} and tuned.json; the kernels read {ROOT / 'kernels' / 'configs.json'}")
    return 0


if __name__ == "__main__":
    from benchmarks import tune as module  # the module that its processes import

    sys.exit(module.main())
