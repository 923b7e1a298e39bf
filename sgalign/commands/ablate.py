"""Train the arms of studies with several seeds each, and write tables and figures of their results.

A study is a YAML file such as configs/studies/table1.yaml. Every run trains and tests one arm with one seed, as
`sgalign fit` and `sgalign test` do, in a folder of its own. If the command is interrupted, run it again: it goes on
inside the runs, from their latest checkpoints.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from sgalign.data.findings import counted
from sgalign.errors import InputError
from sgalign.files import check_writable
from sgalign.studies import estimate, launch, report
from sgalign.studies.cluster import run_on_cluster
from sgalign.studies.plan import Run, plan, record
from sgalign.studies.recording import LAST
from sgalign.studies.results import RESULT, read_result
from sgalign.studies.study import read_study


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign ablate", description=__doc__)
    parser.add_argument("study", nargs="+", type=Path, metavar="STUDY.yaml", help="file of a study")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the runs and the report")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUE",
        help="options of all arms, as for sgalign fit: data.root=VG trainer.max_epochs=5",
    )
    add("--seeds", type=int, metavar="N", help="number of seeds per arm (default: the study's)")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="number of runs at the same time; on GPUs, each has its own (default: 1)",
    )
    add("--dry-run", action="store_true", help="only show the runs, and estimate time and memory from a few steps")
    add("--cluster", choices=("slurm", "local"), help="submit the runs as jobs with submitit, instead of --jobs")
    add(
        "--slurm",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="submitit's parameters of the jobs: partition=gpu gpus_per_node=1 timeout_min=600",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign ablate STUDY.yaml --out FOLDER`, and return the exit code, which is 1 if a run failed."""
    options = parser().parse_args(arguments)
    for name in ("seeds", "jobs"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser().error(f"--{name} must be at least 1, got {value}")
    if options.slurm and not options.cluster:
        parser().error("--slurm needs --cluster")
    if options.cluster and options.jobs > 1:
        parser().error(f"--jobs must be left out with --cluster, which decides how many jobs run, got {options.jobs}")
    studies = [read_study(path, _pairs("--set", options.set)) for path in options.study]
    names = [study.name for study in studies]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"studies must have different names, got {', '.join(repeated)} more than once")
    plans = [plan(study, options.out, options.seeds) for study in studies]
    todo, done = _runs(plans)
    begun = sum((run.folder / f"{LAST}.ckpt").is_file() for run in todo)
    resumed = f" ({begun} of them begun)" if begun else ""
    print(f"{options.out}: {counted(len(todo), 'run')} to do{resumed}, {done} already done", flush=True)
    if options.dry_run:
        _show(plans, todo, options.jobs)
        return 0
    check_writable(options.out / "report.md")
    for study, of_study in zip(studies, plans):
        record(study, of_study, options.out)
    for run in todo:
        run.write()
    failed: list[Run] = []
    try:
        if todo and options.cluster:
            failed = run_on_cluster(todo, options.out, options.cluster, _pairs("--slurm", options.slurm))
        elif todo:
            failed = launch.run_here(todo, options.jobs)
    except KeyboardInterrupt:
        print("\ninterrupted: run the command again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    if failed:
        print(f"{len(failed)} of {len(todo)} runs failed. Run the command again to go on with them")
    if any((run.folder / RESULT).is_file() for of_study in plans for of_arm in of_study for run in of_arm):
        report.write(options.out, [study.name for study in studies])
    return 1 if failed else 0


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            parser().error(f"{option} must be NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def _runs(plans: Sequence[Sequence[Sequence[Run]]]) -> tuple[list[Run], int]:
    """Return the runs that are not done, and the number of those that are.

    Arms of several studies may share a run. All arms run with one seed before the next seed, so results can be compared
    early.
    """
    runs = [run for of_study in plans for of_arm in of_study for run in of_arm]
    unique: dict[Path, Run] = {}
    for run in runs:
        unique.setdefault(run.folder, run)
    todo = [run for run in unique.values() if read_result(run.folder) is None]
    return sorted(todo, key=lambda run: run.seed), len(unique) - len(todo)


def _show(plans: Sequence[Sequence[Sequence[Run]]], todo: Sequence[Run], jobs: int) -> None:
    """Print the runs of each arm and their estimates."""
    folders = {run.folder for run in todo}
    arms = []
    for of_study in plans:
        for of_arm in of_study:
            left = [run for run in of_arm if run.folder in folders]
            folders -= {run.folder for run in left}
            seeds = counted(len(of_arm), "seed")
            print(f"{of_arm[0].study} {of_arm[0].arm}: {seeds}, {len(left)} to do, {of_arm[0].folder.name}")
            arms.append(left)
    if not todo:
        return
    print(f"measuring {estimate.STEPS} steps of each arm", flush=True)
    for line in estimate.describe(arms, launch.slots(todo, jobs)[0], jobs):
        print(line, flush=True)
