"""The report of `benchmarks.gpu_report` as Markdown: ratios, goals and failures. Unmeasured cells stay blank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Figures = dict[str, Any]
DUAL = " dual"
DENSE = ("sdpa twice", "sdpa concatenated")
NOT_REACHED = "no time was left, or the device was lost before"
ALTERNATIVES = (*DENSE, "eager", "flex", "xformers", "flash-attn, no mask")


def markdown(report: Figures) -> str:
    environment = environment_of(report)
    sections = [
        f"# sgalign on {environment.get('card', 'a GPU')}",
        "`python -m benchmarks.gpu_report` wrote this page. All figures are in report.json. Times are medians in ms."
        ' "graph" is the time of one call within the replay of a CUDA graph. "call" is the time of a plain call,'
        ' including the launch. A column "X /" shows the graph time of X divided by the graph time of "dual", which'
        " computes both branches in one call.",
        table(("", ""), environment_rows(environment)),
        "## Goals",
        table(("", "goal", "least favorable", "reached"), goals(report)),
        "## Tests",
        table(("backend", "outcome", "not run"), test_rows(report)),
        "## Attention",
        "The ceilings are the card's measured rates of copying and of matrix products. The share of the ceilings is the"
        " shortest possible time at these rates, divided by the measured time. Exponentials and random numbers are not"
        " counted.",
    ]
    for dtype in ("bfloat16", "float16", "float32"):
        for backward in (True, False):
            rows = [row for row in rows_of(report, f"attention {dtype}") if row["backward"] == backward]
            if rows:
                sections += [f"### {dtype}, {'forward and backward' if backward else 'forward'}"]
                sections += [attention_table(rows, environment)]
    sections += ["## Relation head", relation_table(rows_of(report, "relation"), environment)]
    sections += ["## Alignment loss", loss_table(rows_of(report, "loss"))]
    sections += ["## Training steps", "Times are those of plain calls.", step_table(report)]
    sections += ["## What failed", "\n".join(f"- {failure}" for failure in failures(report)) or "Nothing."]
    return "\n\n".join(section for section in sections if section) + "\n"


# ------------------------------------------------------------------------------------------------------ figures


def environment_of(report: Figures) -> Figures:
    """Return the installed versions and the card's rates in one dictionary."""
    environment = report.get("environment", {})
    return environment.get("installed", {}) | environment.get("rates", {})


def rows_of(report: Figures, part: str) -> list[Figures]:
    return list(report.get(part, {}).get("rows", {}).values())


def time_of(row: Figures, contender: str, kind: str = "graph") -> float | None:
    return row["contenders"].get(contender, {}).get(kind)


def backends_of(row: Figures) -> list[str]:
    return [name.removesuffix(DUAL) for name in row["contenders"] if name.endswith(DUAL)]


def fastest(row: Figures, contenders: Iterable[str]) -> float | None:
    return min((time for name in contenders if (time := time_of(row, name)) is not None), default=None)


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def of_ceilings(row: Figures, environment: Figures, taken: float | None) -> float | None:
    """Return the shortest possible time at the rates measured on this card, divided by the time taken."""
    if taken is None or "bytes" not in row or "bytes per second" not in environment:
        return None
    products = row["flops"] / environment["FLOP per second"][row["dtype"]]
    return 1e3 * max(products, row["bytes"] / environment["bytes per second"]) / taken


def is_sgtr(row: Figures) -> bool:
    return row["shape"][2] == 180 and row["shape"][3] <= 1024


def goals(report: Figures) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each goal, with the least favorable figure."""
    rows = [row for part in report if part.startswith("attention") for row in rows_of(report, part)]
    both = [row for row in rows if row["backward"]]
    dual = lambda row: fastest(row, (name + DUAL for name in backends_of(row)))  # noqa: E731
    sgtr = [row for row in both if is_sgtr(row)]
    large = [row for row in both if min(row["shape"][2:4]) >= 4096]
    environment = environment_of(report)
    steps = [case for case in report.get("steps", {}).values() if isinstance(case, dict) and "counted" in case]
    over = [ratio(time_of(row, "flex"), dual(row)) for row in sgtr]
    yield goal("FlexAttention / dual, SGTR's shapes, forward and backward", 2, over)
    over = [ratio(fastest(row, DENSE), dual(row)) for row in sgtr]
    yield goal("SDPA with dense masks / dual, SGTR's shapes, forward and backward", 3, over)
    over = [of_ceilings(row, environment, dual(row)) for row in large]
    yield goal("share of the ceilings with at least 4096 queries and keys", 0.7, over)
    over = [ratio(step_ratio(case), case["counted"]) for case in steps]
    yield goal("measured ratio / counted ratio of Align steps", 1.05, over, at_most=True)


def goal(name: str, bound: float, values: Iterable[float | None], *, at_most: bool = False) -> tuple[str, ...]:
    known = [value for value in values if value is not None]
    aim = f"{'at most' if at_most else 'at least'} {bound:g}"
    if not known:
        return name, aim, "", "not measured"
    reached = sum(value <= bound if at_most else value >= bound for value in known)
    return name, aim, number((max if at_most else min)(known)), f"{reached} of {len(known)}"


def step_ratio(case: Figures) -> float | None:
    """Return the time of the second contender, which has the mirrored branch, divided by that of the first."""
    base, mirrored = list(case["contenders"].values())[:2]
    return ratio(mirrored["call"], base["call"])


def unfinished(figures: Any) -> bool:
    """Return whether any case or test of a part was not reached."""
    if isinstance(figures, dict):
        not_reached = figures.get("failure") == NOT_REACHED or bool(figures.get("not run"))
        return not_reached or any(map(unfinished, figures.values()))
    return isinstance(figures, list) and any(map(unfinished, figures))


def failed(figures: Figures) -> bool:
    return figures.get("failure", NOT_REACHED) != NOT_REACHED


def failures(report: Figures) -> Iterator[str]:
    """Yield a sentence for each failed part, check, contender and test, and one for each part with unreached cases."""
    for part, figures in report.items():
        if unfinished(figures):
            yield f"{part}: time was up, or the device was lost; run the same command to resume"
        if "failure" in figures:
            yield f"{part}: {figures['failure']}"
        for name, check in figures.get("checks", {}).items():
            if not check.get("right") and check.get("failure") != NOT_REACHED:
                said = check.get("failure") or f"error {check['error']:.1e}, allowed {check['allowed']:.1e}"
                yield f"{part}, check of {name}: {said}"
        for row in rows_of(report, part):
            passes = "forward and backward" if row["backward"] else "forward"
            for name, contender in row["contenders"].items():
                if failed(contender):
                    yield f"{part}, {shape_of(row)}, {row['dtype']}, {passes}, {name}: {contender['failure']}"
    for part, case in (
        ("environment", "installed"),
        ("environment", "rates"),
        *(("steps", n) for n in report.get("steps", {})),
    ):
        figures = report.get(part, {}).get(case, {})
        if isinstance(figures, dict) and failed(figures):
            yield f"{part}, {case}: {figures['failure']}"
    for suite, figures in suites_of(report):
        yield from (f"tests, {suite}: {line}" for line in figures.get("failed", []))


# ------------------------------------------------------------------------------------------------------ tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table, or an empty string if there are no rows."""
    head, rows = list(head), [list(row) for row in rows]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def shape_of(row: Figures) -> str:
    return ", ".join(map(str, row["shape"]))


def suites_of(report: Figures) -> Iterator[tuple[str, Figures]]:
    """Yield the name and the figures of each suite of tests on the device."""
    for part in ("tests", "sanitizer"):
        yield from ((name, figures) for name, figures in report.get(part, {}).items() if isinstance(figures, dict))


def environment_rows(environment: Figures) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if name == "bytes per second":
            yield "copying, read and written", f"{value / 1e12:.2f} TB/s"
        elif name == "FLOP per second":
            yield "matrix products", ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in value.items())
        elif name == "backends":
            yield name, "; ".join(f"{backend}: {state}" for backend, state in value.items())
        elif name not in ("failure", "sources"):
            yield name, str(value)


def test_rows(report: Figures) -> Iterator[tuple[str, ...]]:
    for backend, figures in suites_of(report):
        if "counts" in figures:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in figures["counts"].items())
            yield backend, counts or "nothing ran", str(len(figures["not run"]) or "")


def attention_table(rows: list[Figures], environment: Figures) -> str:
    others = [name for name in ALTERNATIVES if any(name in row["contenders"] for row in rows)]
    head = ["B, H, Lq, Lk, D", "backend", "dual, graph", "call", *(f"{name} /" for name in others)]
    head += [
        "dual / single",
        "same query / masked single",
        "GFLOP",
        "MB",
        "share of the ceilings",
        "peak, MiB",
        "peak of SDPA twice, MiB",
    ]
    lines = []
    for row in rows:
        for backend in backends_of(row):
            dual = time_of(row, backend + DUAL)
            line = [shape_of(row), backend, number(dual, ".3f"), number(time_of(row, backend + DUAL, "call"), ".3f")]
            line += [number(ratio(time_of(row, name), dual)) for name in others]
            line += [number(ratio(dual, time_of(row, f"{backend} single")))]
            line += [number(ratio(time_of(row, f"{backend} same query"), time_of(row, f"{backend} single, masked")))]
            line += [number(row["flops"] / 1e9), number(row["bytes"] / 1e6, ".1f")]
            line += [number(of_ceilings(row, environment, dual), ".0%")]
            line += [number(time_of(row, name, "peak"), ".0f") for name in (backend + DUAL, "sdpa twice")]
            lines.append(line)
    return table(head, lines)


def relation_table(rows: list[Figures], environment: Figures) -> str:
    head = ["R, N, C, K", "dtype", "passes", "backend", "dual, graph", "call"]
    head += ["decomposed /", "usual form /", "dual / single", "GFLOP", "MB", "share of the ceilings"]
    lines = []
    for row in rows:
        for backend in backends_of(row):
            dual = time_of(row, backend + DUAL)
            line = [shape_of(row), row["dtype"], "forward + backward" if row["backward"] else "forward", backend]
            line += [number(dual, ".3f"), number(time_of(row, backend + DUAL, "call"), ".3f")]
            line += [number(ratio(time_of(row, name), dual)) for name in ("decomposed", "usual form")]
            line += [number(ratio(dual, time_of(row, f"{backend} single")))]
            line += [number(row["flops"] / 1e9), number(row["bytes"] / 1e6, ".1f")]
            lines.append([*line, number(of_ceilings(row, environment, dual), ".0%")])
    return table(head, lines)


def loss_table(rows: list[Figures]) -> str:
    lines = [
        (shape_of(row), name, number(time_of(row, name), ".4f"), number(time_of(row, name, "call"), ".4f"))
        for row in rows
        for name in row["contenders"]
    ]
    return table(("R, K", "", "graph", "call"), lines)


def step_table(report: Figures) -> str:
    lines = []
    for case, figures in report.get("steps", {}).items():
        if not isinstance(figures, dict) or "contenders" not in figures:
            continue
        base = next(iter(figures["contenders"].values()))
        for place, (name, taken) in enumerate(figures["contenders"].items()):
            line = [case, name, number(taken["call"]), number(ratio(taken["call"], base["call"]), unit="x")]
            line += [number(figures["counted"], unit="x") if place == 1 else ""]
            lines.append([*line, number(taken["peak"], ".0f"), number(ratio(taken["peak"], base["peak"]), unit="x")])
    return table(("step", "", "ms", "relative to the first", "counted", "peak, MiB", "relative to the first"), lines)
