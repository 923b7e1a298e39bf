"""A study on a real SLURM cluster of one node, with a killed run and a killed launcher."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import slurm
from target import ROOT

from sgalign.commands import main as cli

pytest.importorskip("submitit")

T = TypeVar("T")

ARMS = ("few units", "more units")
SEEDS = 4
STUDY = f"""\
title: Two sizes
config: {ROOT}/configs/motifs_small.yaml
choose: val/mR@50
arms:
  - name: {ARMS[0]}
    set: {{model.hidden_dim: 8}}
  - name: {ARMS[1]}
    base: {ARMS[0]}
    set: {{model.hidden_dim: 16}}
"""
EXECUTE = "sgalign.studies.execute"  # the module that a run's process executes, with the run's folder as its argument
WAIT = 600  # seconds; a run takes about 10 on an idle CPU, and most of that is imports


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands that use a cluster with 2 CPUs."""
    if program := slurm.missing():
        pytest.skip(f"no {program}; on Debian, apt-get install slurm-wlm munge")
    with slurm.one_node(tmp_path / "slurm") as clients:
        yield os.environ | clients | {"OMP_NUM_THREADS": "1"}


def wait(find: Callable[[], T], launcher: subprocess.Popen[bytes], log: Path) -> T:
    """Wait until a function returns something while the launcher works, and return that."""
    end = time.monotonic() + WAIT
    while not (found := find()):
        assert launcher.poll() is None, f"the launcher ended too early: {log.read_text()}"
        assert time.monotonic() < end, f"it took too long: {log.read_text()}"
        time.sleep(0.02)
    return found


def process_of(run: Path) -> int | None:
    """Return the id of the process that trains a run, or None if there is none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            program, *arguments = path.read_bytes().rstrip(b"\0").decode().split("\0")
        except OSError:  # the process has ended
            continue
        if "python" in Path(program).name and EXECUTE in arguments and arguments[-1] == str(run):
            return int(path.parent.name)
    return None


def kill_one(runs: Path) -> Path | None:
    """Kill the process of a run between its first checkpoint and its result. Return the run, or None if none is there.

    A result is written atomically. If it is absent after the kill, the kill came in time.
    """
    for checkpoint in runs.glob("*/last.ckpt"):
        run = checkpoint.parent
        if not (run / "result.json").exists() and (process := process_of(run)):
            subprocess.run(["kill", "-KILL", str(process)])
            time.sleep(0.2)
            if not (run / "result.json").exists():
                return run
    return None


def queue(environment: dict[str, str]) -> str:
    return subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_a_study_runs_on_slurm(tmp_path: Path, environment: dict[str, str]) -> None:
    data, out, study = tmp_path / "data", tmp_path / "out", tmp_path / "study.yaml"
    assert cli.main(["make-dataset", str(data), "--format", "coco", "--sizes", "40", "8", "12"]) == 0
    study.write_text(STUDY)
    command = [
        *(sys.executable, "-m", "sgalign", "ablate", str(study)),
        *("--set", f"data.root={data}", "trainer.max_epochs=3"),
        *("--seeds", str(SEEDS), "--out", str(out), "--cluster", "slurm"),
        *("--slurm", "partition=main", "cpus_per_task=1", "timeout_min=30"),
    ]
    log = tmp_path / "launcher.txt"

    def launch() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file, stderr=file)

    def results() -> dict[Path, int]:
        """Return the files of all results, and the times at which they were written."""
        return {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}

    with launch() as first:
        try:
            killed = wait(lambda: kill_one(out / "runs"), first, log)
            wait(lambda: len(results()) >= 2, first, log)
        finally:
            first.kill()
    before = results()
    assert len(before) < len(ARMS) * SEEDS, "the launcher must be killed in the middle"

    with launch() as second:
        try:
            assert second.wait(WAIT) == 0, log.read_text()
        finally:
            second.kill()
    after = results()
    assert len(after) == len(ARMS) * SEEDS
    assert all(after[path] == written for path, written in before.items()), "a complete run was repeated"
    assert killed is not None and "Restoring states from the checkpoint" in (killed / "log.txt").read_text()
    table = (out / "report.md").read_text()
    assert all(f"| {arm} | {SEEDS} |" in table for arm in ARMS), table
    end = time.monotonic() + WAIT  # jobs of complete runs end as soon as they have started
    while queue(environment):
        assert time.monotonic() < end, "jobs were left in the queue"
        time.sleep(1)
