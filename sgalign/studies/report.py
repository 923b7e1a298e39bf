"""The report of the studies in a folder: tables, plots and one page with all of them."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from sgalign.errors import InputError, shown
from sgalign.files import read_json, written_whole
from sgalign.studies import figures, page, tables
from sgalign.studies.mirror_figure import draw_mirror
from sgalign.studies.recording import BEST
from sgalign.studies.results import read_result
from sgalign.studies.study import check_text
from sgalign.training import SceneGraphData


class Planned(NamedTuple):
    """A study as `plan.record` wrote it, with the results that exist.

    Attributes:
        title: title of the study.
        choose: name of the figure that chose the tested weights.
        bases: name of the base of each arm, or "".
        arms: the results of each arm.
        folders: folders of the planned runs of each arm.
    """

    title: str
    choose: str
    bases: dict[str, str]
    arms: tables.Arms
    folders: dict[str, list[Path]]


def write(out: Path, names: Sequence[str] | None = None) -> None:
    """Write the report of studies to the folder of their runs, and print its tables.

    It consists of `report.md`, `report.html` with all figures inside, `results.csv` and the figures as PNG files.

    Args:
        out: folder that `sgalign ablate` has written.
        names: names of the studies. If None, all studies in the folder that have results.

    Raises:
        FileNotFoundError: if the folder has no studies, or a named study has no results.
        ValueError: if a file was edited or damaged.
    """
    if not out.is_dir():
        raise FileNotFoundError(f"{out}: there is no such folder")
    there = sorted(path.stem for path in (out / "studies").glob("*.json"))
    if not there:
        raise FileNotFoundError(f"{out}: must be a folder that sgalign ablate has written, but it has no studies")
    if missing := sorted(set(names or ()) - set(there)):
        raise FileNotFoundError(f"{out} has the studies {', '.join(there)}, but not {', '.join(missing)}")
    planned = {name: _read(out, name) for name in names or there}
    if bare := [name for name, study in planned.items() if not study.arms]:
        print(f"no run is complete of: {', '.join(bare)}")
    planned = {name: study for name, study in planned.items() if study.arms}
    if not planned:
        raise FileNotFoundError(f"{out}: no run of these studies is complete")
    lines = []
    for name, study in planned.items():
        lines += _text(out, name, study)
    tables.write_csv(out / "results.csv", {name: study.arms for name, study in planned.items()})
    text = "\n".join(lines)
    with written_whole(out / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    page.write_page(out / "report.html", text)
    print(re.sub(r"!\[.*\n\n", "", text))
    print(f"page {out / 'report.html'}, text {out / 'report.md'}, numbers {out / 'results.csv'}, figures {out}/*.png")


def _read(out: Path, name: str) -> Planned:
    path = out / "studies" / f"{name}.json"
    record = read_json(path, "run sgalign ablate again")
    try:
        folders = {arm["name"]: [out / "runs" / run for run in arm["runs"]] for arm in record["arms"]}
        bases = {arm["name"]: arm["base"] for arm in record["arms"]}
        title, choose = record["title"], record["choose"]
        for text in (title, choose, *bases, *(base for base in bases.values() if base != "")):
            check_text(path, text)
        if outside := [r for runs in folders.values() for r in runs if r.parent != out / "runs" or r.name == ".."]:
            raise InputError(f"{path}: runs must be in {out / 'runs'}, got {shown(str(outside[0]))}")
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: must be a file that sgalign ablate wrote: run it again") from error
    results = {arm: [found for run in runs if (found := read_result(run))] for arm, runs in folders.items()}
    arms = {arm: sorted(runs, key=lambda run: run["seed"]) for arm, runs in results.items() if runs}
    return Planned(title, choose, bases, arms, folders)


def _text(out: Path, name: str, study: Planned) -> list[str]:
    """Return the lines of one study in Markdown, and draw its figures."""
    complete, planned = (sum(map(len, runs.values())) for runs in (study.arms, study.folders))
    one = next(iter(study.arms.values()))[0]
    options = one["settings"]["trainer"] | one["settings"]["data"]["init_args"]
    training = ", ".join(f"{name} {options[name]}" for name in ("max_epochs", "max_steps", "batch_size"))
    lines = [f"## {study.title}", "", f"The tested weights are those with the highest {study.choose}."]
    lines += [f"The test has {len(one['images'])} images. The first run has {training}.", ""]
    lines += [*tables.of_arms(study.arms, study.choose), ""]
    intervals = tables.differences(study.bases, study.arms)
    if intervals:
        lines += [*tables.of_differences(study.bases, study.arms, intervals), ""]
    if complete < planned:
        missing = [arm for arm in study.bases if arm not in study.arms]
        without = f" No run yet: {', '.join(missing)}." if missing else ""
        lines += [f"{complete} of {planned} runs are complete.{without}", ""]
    drawn = {}
    if any(intervals.values()):
        drawn["differences"] = "differences from the base, with 95 % intervals"
        figures.draw_differences(out / f"{name}_differences.png", study.bases, intervals)
        drawn["predicates"] = "recall of each predicate, compared with the base (Figure 2 of the supplement)"
        figures.draw_predicates(out / f"{name}_predicates.png", study.bases, study.arms, intervals)
    drawn["curves"] = "validation by training step"
    figures.draw_curves(out / f"{name}_curves.png", study.arms, study.choose.removeprefix("val/"))
    if _draw_mirror(out / f"{name}_mirror.png", study):
        drawn["mirror"] = "attention of both branches in the last decoder layer (compare Figure 1)"
    for kind, caption in drawn.items():
        lines += [f"![{caption}]({name}_{kind}.png)", ""]
    return [*lines, "### Cost", "", *tables.of_costs(study.bases, study.arms), ""]


def _draw_mirror(path: Path, study: Planned) -> bool:
    """Draw the attention of the first run of Align-SGTR that has a best checkpoint. Return True if there is one."""
    of_sgtr = [arm for arm, runs in study.arms.items() if "AlignSGTR" in runs[0]["settings"]["model"]["class_path"]]
    complete = [folder for arm in of_sgtr for folder in study.folders[arm] if (folder / f"{BEST}.ckpt").is_file()]
    if not complete:
        return False
    try:
        data = _data(complete[0] / "config.yaml")
        graph = next(graph for graph in data.test if graph.image is not None and len(graph.relations))
        assert graph.image is not None
        draw_mirror(complete[0] / f"{BEST}.ckpt", graph.image(), graph.image_id, path)
    except (OSError, InputError, StopIteration) as error:  # the data may not be on this machine
        print(f"{path.name} is not drawn: {error or 'no test image has relations'}")
        return False
    return True


def _data(path: Path) -> SceneGraphData:
    """Return the data of a run's config. Only classes of this package are used, so a report runs no other code."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        name, options = config["class_path"], dict(config["init_args"])
        kind = pkgutil.resolve_name(name) if name.startswith("sgalign.training.") else None
        if isinstance(kind, type) and issubclass(kind, SceneGraphData):
            return kind(**options)
    except InputError:
        raise
    except (AttributeError, ImportError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: must be a config that sgalign ablate wrote ({shown(error)})") from error
    raise InputError(f"{path}: the data must be of a class of sgalign.training, got {shown(name)}")
