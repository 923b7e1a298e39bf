"""Running the runs of a study on a cluster, through submitit."""

from __future__ import annotations

import pickle
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgalign.errors import InputError
from sgalign.numbers import whole_number
from sgalign.studies import claims, launch
from sgalign.studies.plan import Run
from sgalign.studies.progress import Progress, title
from sgalign.studies.recording import PROGRESS
from sgalign.studies.results import RESULT, digest

PAUSE = 10.0  # seconds between two looks at the jobs
NUMBERS = ("timeout_min", "nodes", "gpus_per_node", "cpus_per_task", "tasks_per_node")  # submitit's general options
FAILED = -1000  # code of a job in which submitit itself failed
PATIENCE = 60.0  # seconds after which a job that has left the queue without a result counts as ended


class Job:
    """The work of one job on the cluster, which submitit pickles and calls there.

    If the cluster preempts the job or its time is over, submitit submits it again, and the run goes on from its latest
    checkpoint.

    Args:
        folder: folder of the run.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Do the run in a process of its own, so the job also ends well if that is killed, and return its exit code."""
        folder = Path(self.folder)
        if (folder / RESULT).is_file():
            return 0
        self._process = launch.start(folder, {}, own_session=False)
        return self._process.wait()

    def checkpoint(self) -> Any:
        """End the run's process, and return the submission that goes on with the run.

        Submitit calls this in a signal handler before the job ends. The process releases its claim. Otherwise the next
        job, on another machine, would find the run claimed.
        """
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            end = time.monotonic() + launch.PATIENCE
            while claims.holder(Path(self.folder)) and time.monotonic() < end:
                time.sleep(0.5)
        return DelayedSubmission(Job(self.folder))


def run_on_cluster(runs: Sequence[Run], out: Path, kind: str, options: Mapping[str, str]) -> list[Run]:
    """Submit one job for each run, wait for all of them, and return the runs that failed.

    The jobs go on if this process ends. The same command then submits jobs for the runs that are not done. A job whose
    run another job does ends at once, and is submitted again if that other job ends without a result.

    Args:
        runs: the runs.
        out: folder of the study, which all machines of the cluster must share. Submitit's files go to `out/jobs`.
        kind: "slurm", or "local" for submitit's processes on this machine.
        options: parameters of submitit, such as {"partition": "gpu", "gpus_per_node": "1", "timeout_min": "600"}.

    Raises:
        ValueError: if submitit is not installed, or refuses the options.
    """
    executor = _executor(out, kind, options)
    jobs = _submit(executor, runs, kind)
    pending, failed = list(runs), []
    gone: dict[str, float] = {}  # time when a job was first missing in the queue
    with Progress(len(runs)) as progress:
        while pending:
            queue = _queue(kind, jobs.values())
            for run in list(pending):
                job = jobs[run.folder]
                if (run.folder / RESULT).is_file():
                    error = None
                elif (code := _code(job)) is not None:
                    if code == claims.LOST and claims.holder(run.folder):
                        continue  # another job does the run
                    if code == 0 and time.monotonic() - gone.setdefault(job.job_id, time.monotonic()) < PATIENCE:
                        continue  # the shared folder may show the result late
                    if code == claims.LOST:
                        jobs |= _submit(executor, [run], kind)
                        continue
                    log = run.folder / "log.txt" if code != FAILED else Path(job.paths.stderr)
                    error = f"{launch.reason(code, log)}, see {log}"
                elif queue is not None and job.job_id not in queue:
                    if time.monotonic() - gone.setdefault(job.job_id, time.monotonic()) < PATIENCE:
                        continue
                    error = f"job {job.job_id} has ended without a result, see {job.paths.stderr}"
                else:
                    continue
                pending.remove(run)
                failed += [run] if error else []
                progress.finished(run, error)
            progress.update({run.folder: run for run in pending if (run.folder / PROGRESS).is_file()})
            time.sleep(PAUSE if pending else 0)
    _cancel_waiting(kind, jobs.values())
    return failed


def _executor(out: Path, kind: str, options: Mapping[str, str]) -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise InputError("--cluster needs submitit: pip install 'sgalign[cluster]'") from error
    # Options that only SLURM has are submitit's with a prefix. The name finds the jobs of this folder in the queue.
    named: dict[str, Any] = {"name": f"sgalign-{digest(str(out.resolve()))}"}
    for option, value in options.items():
        number = whole_number(value) if option in NUMBERS else None
        named[option if option in (*NUMBERS, "name", "mem_gb") else f"slurm_{option.removeprefix('slurm_')}"] = (
            value if number is None else number
        )
    try:
        # A job whose time is over is submitted again, as often as it takes.
        executor = submitit.AutoExecutor(folder=out / "jobs", cluster=kind, slurm_max_num_timeout=10**6)
        executor.update_parameters(**named)
    except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
        raise InputError(f"--cluster {kind}: submitit refuses: {' '.join(str(error).split())}") from error
    return executor


def _submit(executor: Any, runs: Sequence[Run], kind: str) -> dict[Path, Any]:
    """Submit one job for each run, and return the jobs by the folders of the runs."""
    from submitit.core.utils import FailedJobError

    try:
        with executor.batch():  # one array of jobs, if the cluster has arrays
            jobs = [executor.submit(Job(str(run.folder))) for run in runs]
    except FailedJobError as error:  # such as an unknown partition
        raise InputError(f"--cluster {kind}: the jobs were not accepted: {' '.join(str(error).split())}") from error
    names = title(runs[0]) if len(runs) == 1 else f"{len(runs)} runs"
    ids = f"job {jobs[0].job_id}" if len(jobs) == 1 else f"jobs {jobs[0].job_id} to {jobs[-1].job_id}"
    print(f"submitted {names} to {kind} as {ids}; logs of submitit are in {executor.folder}", flush=True)
    return {run.folder: job for run, job in zip(runs, jobs)}


def _code(job: Any) -> int | None:
    """Return the exit code of a job's run, or None if the job has not written its result.

    Submitit's own `job.done()` asks SLURM's accounting, which many clusters lack. It then never says that a job failed.
    """
    path = Path(job.paths.result_pickle)
    if not path.is_file():
        return None
    try:
        outcome, value = pickle.loads(path.read_bytes())
    except (EOFError, pickle.UnpicklingError):  # being written
        return None
    return value if outcome == "success" else FAILED


def _cancel_waiting(kind: str, jobs: Iterable[Any]) -> None:
    """Cancel the jobs that still wait, because other jobs did their runs."""
    ids = [job.job_id for job in jobs if _code(job) is None]
    if kind == "slurm" and ids:
        subprocess.run(["scancel", "--state=PENDING", *ids], capture_output=True, check=False)


def _queue(kind: str, jobs: Iterable[Any]) -> set[str] | None:
    """Return the ids of the jobs that wait or run, or None if the cluster does not answer."""
    if kind == "local":
        return {job.job_id for job in jobs if not job.done()}
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else None
