"""Tables and plots that compare the arms of a study, such as two models, and mark differences that exceed noise."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sgalign.errors import InputError
from sgalign.files import save_figure, written_whole
from sgalign.metrics.results import split_name
from sgalign.metrics.runs import DEPTH, Run

COLUMNS = ("R@50", "mR@50", "mR@100", "ngR@50", "zR@100", "mR@100/tail")  # test metrics in the table of arms
PAIRED = (("R", 50), ("mR", 50), ("mR", 100))  # metric and K in the table of differences
CURVE = ("R@50", "R@100", "mR@50", "mR@100")  # validation metrics in the CSV file
SAMPLES = 2000  # number of bootstrap samples


def write_csv(path: Path, studies: dict[str, dict[str, list[Run]]]) -> None:
    """Write the results of all runs to a CSV file, one value per line.

    The columns are `study`, `arm`, `seed`, `part` ("validation" or "test"), `epoch`, `metric`, `k`, `of` (the subset
    that the metric covers) and `value`.

    Args:
        path: the CSV file. It appears only when it is complete.
        studies: the runs of each arm of each study.
    """
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("study", "arm", "seed", "part", "epoch", "metric", "k", "of", "value"))
        for study, arms in studies.items():
            for arm, run in ((arm, run) for arm, runs in arms.items() for run in runs):
                for epoch, figures in enumerate(run["curve"], 1):
                    for name in CURVE:
                        writer.writerow(
                            (study, arm, run["seed"], "validation", epoch, *split_name(name), figures[name])
                        )
                for name, value in run["test"].items():
                    metric, k, of = split_name(name)
                    if metric != "R" or not of or k == DEPTH:  # predicates: only the K that is drawn
                        writer.writerow((study, arm, run["seed"], "test", run["epoch"], metric, k, of, value))


def table(bases: Mapping[str, str], arms: dict[str, list[Run]]) -> list[str]:
    """Return the lines of two Markdown tables: the results of the arms, and their differences from their bases.

    The first table has means and standard deviations over seeds, in percent. The second has differences and their 95 %
    bootstrap intervals, in percentage points.

    Args:
        bases: for each arm, the name of its base, which is the arm that it is compared with, or "" for none.
        arms: the runs of each arm. Arms without runs are left out.
    """
    lines = [
        "| | seeds | validation mR@50 | " + " | ".join(f"test {column}" for column in COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 3),
    ]
    for name, runs in arms.items():
        validation = spread([run["curve"][run["epoch"] - 1]["mR@50"] for run in runs])
        # A data set with few predicates may have no tail.
        cells = [spread([run["test"][column] for run in runs if column in run["test"]]) for column in COLUMNS]
        lines.append(f"| {name} | {len(runs)} | {validation} | " + " | ".join(cells) + " |")
    headers = [f"{metric}@{k}" for metric, k in PAIRED]
    lines += ["", "| | minus | " + " | ".join(headers) + " |", "|" + "---|" * (len(PAIRED) + 2)]
    for name, base in _compared(bases, arms).items():
        cells = []
        for metric, k in PAIRED:
            difference, low, high = paired_difference(arms[name], arms[base], metric, k)
            beyond = "" if low <= 0 <= high else " *"
            cells.append(f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}){beyond}")
        lines.append(f"| {name} | {base} | " + " | ".join(cells) + " |")
    without = ", ".join(name for name in bases if name not in arms)
    one = all(len(runs) == 1 for runs in arms.values())
    over = "images (one seed says nothing about the spread over seeds)" if one else "seeds and images"
    lines += ["", f"\\* the 95 % interval over {over} excludes 0"]
    return [*lines, *(["", f"no run yet: {without}"] if without else [])]


def _compared(bases: Mapping[str, str], arms: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """Return the base of each arm that has at least one seed in common with its base."""
    seeds = {name: {run["seed"] for run in runs} for name, runs in arms.items()}
    return {name: base for name, base in bases.items() if seeds.get(name, set()) & seeds.get(base, set())}


def spread(values: Sequence[float]) -> str:
    """Return the mean and the standard deviation of fractions as text in percent, or a dash if there are none."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def paired_difference(runs: Sequence[Run], base: Sequence[Run], metric: str, k: int) -> tuple[float, float, float]:
    """Return the mean difference between `runs` and `base`, and the ends of its 95 % bootstrap interval.

    The bootstrap draws test images and seeds with replacement, and uses the same draw for `runs` and `base`. With few
    seeds the interval is somewhat too narrow, because the bootstrap underestimates the variance over S seeds by the
    factor (S - 1) / S.

    Args:
        runs, base: runs from `read_runs`. Only runs whose seed is in both are compared.
        metric: "R" or "mR".
        k: K of the metric, at most 100.

    Raises:
        ValueError: if no seed is in both, or the runs were tested on different images.
    """
    by_seed = {run["seed"]: run for run in base}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if not pairs:
        raise InputError(
            f"base must have at least one of the seeds {sorted(run['seed'] for run in runs)}, got {sorted(by_seed)}"
        )
    if any(run["predicates"] != pairs[0][0]["predicates"] for both in pairs for run in both):
        raise InputError("runs and base must have the same test images, got different ones")
    image, predicate = _units(pairs[0][0], metric)
    differences = torch.stack([_recalls(run, metric, k) - _recalls(other, metric, k) for run, other in pairs])
    generator = torch.Generator().manual_seed(0)
    images, predicates = len(pairs[0][0]["predicates"]), int(max(map(max, filter(None, pairs[0][0]["predicates"]))))
    seeds = torch.randint(len(pairs), (SAMPLES, len(pairs)), generator=generator)
    drawn = torch.randint(images, (SAMPLES, images), generator=generator)
    weights = torch.zeros(SAMPLES, images, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    # The first row is the original sample, with weight 1 for each image.
    weights = torch.cat((torch.ones(1, images, dtype=torch.float64), weights))[:, image]
    sampled = torch.cat((differences.mean(0, keepdim=True), differences[seeds].mean(1)))
    total = torch.zeros(SAMPLES + 1, predicates + 1, dtype=torch.float64)
    count = total.index_add(1, predicate, weights)
    total.index_add_(1, predicate, weights * sampled)
    # A predicate that does not occur in the drawn images counts as 0, as in the metric.
    value = (total / count.clamp(min=1)).sum(1)
    if metric == "mR":
        value /= sum(map(len, pairs[0][0]["groups"].values()))
    low, high = value[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return value[0].item(), low, high


def _units(run: Run, metric: str) -> tuple[Tensor, Tensor]:
    """Return the image index and the predicate of each unit that a metric averages over, int64 `[U]` each.

    For "R", a unit is an image, and its predicate is 0. For "mR", a unit is an image and one of its predicates.
    """
    units = [
        (image, predicate)
        for image, predicates in enumerate(run["predicates"])
        for predicate in (sorted(set(predicates)) if metric == "mR" else [0][: len(predicates)])
    ]
    image, predicate = torch.tensor(units).unbind(1)
    return image, predicate


def _recalls(run: Run, metric: str, k: int) -> Tensor:
    """Return the recall of each unit of `_units`, float64 `[U]`."""
    recalls = []
    for predicates, ranks in zip(run["predicates"], run["ranks"], strict=True):
        found: dict[int, list[bool]] = {}
        for predicate, rank in zip(predicates, ranks, strict=True):
            found.setdefault(predicate if metric == "mR" else 0, []).append(rank < k)
        recalls += [sum(found[key]) / len(found[key]) for key in sorted(found)]
    return torch.tensor(recalls, dtype=torch.float64)


def draw_curves(path: Path, arms: dict[str, list[Run]]) -> None:
    """Draw the validation recall of each arm by epoch, as the mean over seeds.

    For the first arm, the range over seeds is drawn too.

    Args:
        path: the image file.
        arms: the runs of each arm.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("R@50", "mR@50"), strict=True):
        for number, (name, runs) in enumerate(arms.items()):
            color = "black" if number == 0 else colormaps["viridis"]((number - 1) / max(len(arms) - 2, 1))
            values = [[100 * epoch[metric] for epoch in run["curve"]] for run in runs]
            epochs = range(1, min(map(len, values)) + 1)
            by_epoch = list(zip(*values))
            axes.plot(epochs, [statistics.mean(v) for v in by_epoch], color=color, marker=".", label=name)
            if number == 0:
                axes.fill_between(epochs, list(map(min, by_epoch)), list(map(max, by_epoch)), color=color, alpha=0.1)
        axes.set(xlabel="epoch", ylabel=f"validation {metric}, %", xticks=epochs)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_predicates(path: Path, bases: Mapping[str, str], arms: dict[str, list[Run]]) -> None:
    """Draw the difference in R@100 between each arm and its base for each predicate.

    Bars are means over seeds, and dots are single seeds. The plot has the form of Figure 2 in the supplement of Xu,
    Liao, Sigal (WACV 2024).

    Args:
        path: the image file.
        bases, arms: as for `table`.
    """
    from matplotlib.figure import Figure

    groups: dict[str, list[str]] = next(iter(arms.values()))[0]["groups"]
    names = [name for predicates in groups.values() for name in predicates]
    others = _compared(bases, arms)
    figure = Figure(figsize=(12, 0.7 + 2.3 * max(len(others), 1)), layout="constrained")
    panels = figure.subplots(max(len(others), 1), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (arm, base) in zip(panels, others.items()):
        of_base = {run["seed"]: run["test"] for run in arms[base]}
        change = [
            [100 * (run["test"][f"R@100/{name}"] - of_base[run["seed"]][f"R@100/{name}"]) for name in names]
            for run in arms[arm]
            if run["seed"] in of_base
        ]
        mean = [statistics.mean(values) for values in zip(*change)]
        better, worse = sum(value > 0 for value in mean), sum(value < 0 for value in mean)
        axes.bar(range(len(names)), mean, color="tab:orange")
        for values in change:
            axes.plot(range(len(names)), values, ".", color="black", markersize=2)
        axes.axhline(0, color="black", linewidth=0.5)
        end = 0
        for group, predicates in groups.items():
            axes.axvline(end - 0.5, color="gray", linewidth=0.5)
            axes.text(end, axes.get_ylim()[1], group, va="top", fontsize=8)
            end += len(predicates)
        axes.set_ylabel("points of R@100", fontsize=8)
        axes.set_xlim(-1, len(names))
        of = f"{arm} minus {base}, {len(change)} seeds"
        axes.set_title(f"{of}: {better} predicates better, {worse} worse", fontsize=9)
    size = 8 if len(names) <= 30 else 6
    panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    save_figure(figure, path)
