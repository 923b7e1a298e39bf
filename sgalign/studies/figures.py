"""Plots of the results of a study."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sgalign.files import save_figure
from sgalign.studies.tables import PAIRED, Arms, Intervals


def draw_differences(path: Path, bases: Mapping[str, str], intervals: Intervals) -> None:
    """Draw the difference of each arm from its base as a dot, and its 95 % interval as a line.

    Intervals that exclude 0 are colored: blue if the arm is better than its base, red if it is worse.

    Args:
        path: the image file.
        bases, intervals: as for `tables.of_differences`. Arms without intervals are left out.
    """
    shown = {name: of_arm for name, of_arm in intervals.items() if of_arm}
    common = {bases[name] for name in shown}
    figure = Figure(figsize=(12, 1.2 + 0.25 * len(shown)), layout="constrained")
    figure.suptitle(
        f"minus {common.pop()}" if len(common) == 1 else "each minus its base", fontsize=9, parse_math=False
    )
    for column, axes in enumerate(figure.subplots(1, len(PAIRED), sharey=True)):
        for row, of_arm in enumerate(shown.values()):
            difference, low, high = (100 * value for value in of_arm[column])
            color = "tab:blue" if low > 0 else "tab:red" if high < 0 else "gray"
            axes.plot([low, high], [row, row], color=color)
            axes.plot(difference, row, "o", color=color, markersize=5)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_xlabel("points of {}@{}".format(*PAIRED[column]))
        axes.set_yticks(range(len(shown)), list(shown), fontsize=8, parse_math=False)
        axes.set_ylim(len(shown) - 0.5, -0.5)
    save_figure(figure, path)


def draw_curves(path: Path, arms: Arms, choose: str) -> None:
    """Draw the validation figures of each arm by training step, as the mean over seeds.

    For the first arm, the range over seeds is drawn too.

    Args:
        path: the image file.
        arms: the results of each arm.
        choose: name of the figure that chose the tested weights. R@50 and mR@50 are drawn beside it, if there are any.
    """
    figure = Figure(figsize=(12, 4.5 + 0.1 * len(arms)), layout="constrained")
    first = next(iter(arms.values()))[0]["curve"][0]
    metrics = [name for name in dict.fromkeys((choose, "R@50", "mR@50")) if name in first]
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for number, (name, runs) in enumerate(arms.items()):
            color = "black" if number == 0 else colormaps["viridis"]((number - 1) / max(len(arms) - 2, 1))
            by_step: dict[float, list[float]] = {}
            for run in runs:
                for point in run["curve"]:
                    by_step.setdefault(point["step"], []).append(100 * point[metric])
            steps = sorted(by_step)
            means = [statistics.mean(by_step[step]) for step in steps]
            axes.plot(steps, means, color=color, marker=".", label=name.replace("$", r"\$"))
            if number == 0:
                low, high = ([function(by_step[step]) for step in steps] for function in (min, max))
                axes.fill_between(steps, low, high, color=color, alpha=0.1)
        axes.set(xlabel="training step", ylabel=f"validation {metric}, %")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)


def draw_predicates(path: Path, bases: Mapping[str, str], arms: Arms, intervals: Intervals) -> None:
    """Draw the difference in R@100 between each arm and its base for each predicate.

    Bars are means over seeds, and dots are single seeds. The plot has the form of Figure 2 in the supplement of Xu,
    Liao, Sigal (WACV 2024).

    Args:
        path: the image file.
        bases, arms, intervals: as for `tables.of_differences`. Arms without intervals are left out.
    """
    others = {name: bases[name] for name, of_arm in intervals.items() if of_arm}
    groups: dict[str, list[str]] = arms[next(iter(others))][0]["groups"]
    names = [name for predicates in groups.values() for name in predicates]
    figure = Figure(figsize=(12, 0.7 + 2.3 * len(others)), layout="constrained")
    panels = figure.subplots(len(others), 1, sharex=True, squeeze=False)[:, 0]
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
            axes.text(end - 0.4, axes.get_ylim()[1], group, va="top", fontsize=8)
            end += len(predicates)
        axes.set_ylabel("points of R@100", fontsize=8)
        axes.set_xlim(-1, len(names))
        of = f"{arm} minus {base}, {len(change)} seeds"
        axes.set_title(f"{of}: {better} predicates better, {worse} worse", fontsize=9, parse_math=False)
    size = 8 if len(names) <= 30 else 6
    panels[-1].set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    save_figure(figure, path)
