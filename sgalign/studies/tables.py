"""Tables of the results of a study, as CSV and as Markdown."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from sgalign.files import written_whole
from sgalign.metrics.results import is_of_class, split_name
from sgalign.studies.intervals import paired_difference
from sgalign.studies.results import DEPTH, Result

VALIDATED = ("mR@50", "mR@100")  # validation figures in the table of arms, as in the paper's tables
TESTED = ("R@50", "mR@50", "mR@100", "ngR@50", "zR@100", "mR@100/tail")  # test figures
PAIRED = (("R", 50), ("mR", 50), ("mR", 100))  # metric and K in the table of differences

Arms = dict[str, list[Result]]  # the results of each arm, sorted by seed; arms without results are left out
Intervals = dict[str, list[tuple[float, float, float]]]  # of each arm: difference from its base and interval, by metric


def write_csv(path: Path, studies: Mapping[str, Arms]) -> None:
    """Write the results of all runs to a CSV file, one value per line.

    The columns are `study`, `arm`, `seed`, `part` ("validation", "test" or "cost"), `epoch`, `step`, `metric`, `k`,
    `of` (the subset that the metric covers) and `value`. Test and cost have the epoch and the step of the tested
    weights.

    Args:
        path: the CSV file. It appears only when it is complete.
        studies: the results of each arm of each study.
    """
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("study", "arm", "seed", "part", "epoch", "step", "metric", "k", "of", "value"))
        for study, arms in studies.items():
            for arm, run in ((arm, run) for arm, runs in arms.items() for run in runs):
                row = study, arm, run["seed"]
                for point in run["curve"]:
                    when = point["epoch"], point["step"]
                    for name in [name for name in point if name not in ("epoch", "step")]:
                        writer.writerow((*row, "validation", *when, *split_name(name), point[name]))
                best = run["curve"][run["epoch"] - 1]
                when = best["epoch"], best["step"]
                for name, value in run["test"].items():
                    metric, k, of = split_name(name)
                    if metric != "R" or not of or k == DEPTH:  # predicates: only the K that is drawn
                        writer.writerow((*row, "test", *when, metric, k, of, value))
                for name, cost in run["cost"].items():
                    writer.writerow((*row, "cost", *when, name, None, "", cost))


def of_arms(arms: Arms, choose: str) -> list[str]:
    """Return the lines of a Markdown table with the means and standard deviations over seeds, in percent.

    Args:
        arms: the results of each arm.
        choose: name of the logged figure that chose the tested weights.
    """
    runs = [run for of_arm in arms.values() for run in of_arm]
    names = dict.fromkeys([*VALIDATED, choose.removeprefix("val/")])
    validated = [name for name in names if name in runs[0]["curve"][0]]
    tested = [name for name in TESTED if name in runs[0]["test"]]
    if not tested:  # a detector
        tested = [name for name in runs[0]["test"] if not is_of_class(name)]
    headers = [*(f"validation {name}" for name in validated), *(f"test {name}" for name in tested)]
    lines = ["| | seeds | " + " | ".join(headers) + " |", "|" + "---|" * (len(headers) + 2)]
    for name, of_arm in arms.items():
        best = [run["curve"][run["epoch"] - 1] for run in of_arm]
        cells = [spread([figures[column] for figures in best]) for column in validated]
        # A data set with few predicates may have no tail.
        cells += [spread([run["test"][column] for run in of_arm if column in run["test"]]) for column in tested]
        lines.append(f"| {name} | {len(of_arm)} | " + " | ".join(cells) + " |")
    return lines


def differences(bases: Mapping[str, str], arms: Arms) -> Intervals:
    """Return the difference of each arm from its base in the metrics of `PAIRED`, with its 95 % bootstrap interval.

    The list of an arm is empty if the arm and its base have other test images. Arms whose test has no relations are
    left out.

    Args:
        bases: for each arm, the name of its base, which is the arm that it is compared with, or "" for none.
        arms: the results of each arm.
    """
    intervals: Intervals = {}
    for name, base in compared(bases, arms).items():
        first, *others = [run["predicates"] for run in (*arms[name], *arms[base])]
        if any(first):
            same = all(other == first for other in others)
            intervals[name] = [paired_difference(arms[name], arms[base], *metric) for metric in PAIRED] if same else []
    return intervals


def of_differences(bases: Mapping[str, str], arms: Arms, intervals: Intervals) -> list[str]:
    """Return the lines of a Markdown table of differences, in percentage points.

    Args:
        bases, arms: as for `differences`.
        intervals: the result of `differences`.
    """
    headers = [f"{metric}@{k}" for metric, k in PAIRED]
    lines = ["| | minus | " + " | ".join(headers) + " |", "|" + "---|" * (len(PAIRED) + 2)]
    starred = False
    for name, of_arm in intervals.items():
        cells = []
        for difference, low, high in of_arm:
            starred |= (is_beyond := not low <= 0 <= high)
            beyond = " *" if is_beyond else ""
            cells.append(f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}){beyond}")
        lines.append(f"| {name} | {bases[name]} | " + " | ".join(cells or ["other test images"] * len(PAIRED)) + " |")
    if not any(intervals.values()):
        return lines
    seeds = {name: {run["seed"] for run in runs} for name, runs in arms.items()}
    note = "In parentheses are 95 % intervals over seeds and test images."
    if any(len(seeds[name] & seeds[bases[name]]) == 1 for name in intervals):
        note += " Where an arm has only one seed in common with its base, they say nothing about the spread over seeds."
    return [*lines, "", note + (" A star marks the intervals that exclude 0." if starred else "")]


def of_costs(bases: Mapping[str, str], arms: Arms) -> list[str]:
    """Return the lines of a Markdown table with time and memory, as means over seeds.

    The ratio divides the time per step by that of the base, for the seeds that both have.
    """
    others = compared(bases, arms)
    lines = [
        "| | ms per step | ratio to base | training, minutes | memory, GiB | trained parameters, millions | device |",
        "|" + "---|" * 7,
    ]
    for name, runs in arms.items():
        step = [1e3 * run["cost"]["step"] for run in runs if "step" in run["cost"]]
        ratio = "–"
        if name in others:
            of_base = {run["seed"]: run["cost"].get("step") for run in arms[others[name]]}
            pairs = [(run["cost"].get("step"), of_base.get(run["seed"])) for run in runs]
            ratios = [own / base for own, base in pairs if own and base]
            ratio = f"{statistics.mean(ratios):.2f}" if ratios else "–"
        cells = [
            f"{statistics.mean(step):.1f}" if step else "–",
            ratio,
            f"{statistics.mean(run['cost']['training'] for run in runs) / 60:.1f}",
            f"{max(run['cost']['memory'] for run in runs) / 2**30:.2f}",
            f"{runs[0]['cost']['parameters'] / 1e6:.2f}",
            ", ".join(sorted({run["cost"]["device"] for run in runs})),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", "Runs at the same time on one machine make each other slower."]


def compared(bases: Mapping[str, str], arms: Arms) -> dict[str, str]:
    """Return the base of each arm that has at least one seed in common with its base."""
    seeds = {name: {run["seed"] for run in runs} for name, runs in arms.items()}
    return {name: base for name, base in bases.items() if seeds.get(name, set()) & seeds.get(base, set())}


def spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of fractions as text in percent, or a dash if there are none."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"
