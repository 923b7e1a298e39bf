"""Train variants of Motifs with several seeds each, and write tables of their results."""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from sgalign.commands import studies
from sgalign.data import GraphBatch
from sgalign.files import check_writable
from sgalign.metrics.matching import rank_triplets, relation_overlaps
from sgalign.metrics.results import is_of_predicate
from sgalign.metrics.runs import DEPTH, Run, run_path, write_run
from sgalign.training import RelationModule
from sgalign.training.scarce import ScarceData

# ---- one run


class _Best(Callback):
    """A callback that keeps the validation figures of all epochs and the weights of the best epoch.

    The best epoch has the highest (R@100 + mR@100) / 2, by which SGTR's public code chooses its model.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RelationModule)
        figures = pl_module.recall.compute().items()
        self.epochs.append({name: round(v.item(), 5) for name, v in figures if not is_of_predicate(name)})
        number = [epoch["R@100"] + epoch["mR@100"] for epoch in self.epochs]
        if number[-1] == max(number):
            self.epoch = len(number)
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def run(root: str | None, arm: studies.Arm, seed: int, epochs: int, path: Path) -> Run:
    """Train an arm with a seed, test its best epoch, write the results to a file and return them.

    Args:
        root: folder of a data set. If None, the generated scenes.
        arm: arm of a study.
        seed: seed of the weights, the masks and the order of the images.
        epochs: number of training epochs.
        path: the file to write. It appears only when the run is complete.
    """
    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    check_writable(path)
    pl.seed_everything(seed, verbose=False)
    start = time.monotonic()
    data = ScarceData(root, seed=seed, **arm.data)
    module = studies.MODULES[arm.module](**arm.options)
    best = _Best()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[best],
    )
    trainer.fit(module, datamodule=data)
    module.load_state_dict(best.weights)
    trainer.test(module, datamodule=data, verbose=False)
    result: Run = {
        "seed": seed,
        "settings": studies.settings(studies.data_name(root), arm, epochs),
        "seconds": round(time.monotonic() - start),
        "curve": best.epochs,
        "epoch": best.epoch,
        "test": {name: round(value.item(), 5) for name, value in module.recall.compute().items()},
        "groups": {
            group: [data.predicate_names[predicate] for predicate in predicates]
            for group, predicates in data.predicate_groups.items()
        },
        "predicates": [graph.relations[:, 2].tolist() for graph in data.test],
        "ranks": ranks(module, data.test_dataloader()),
    }
    write_run(path, result)
    return result


@torch.no_grad()
def ranks(module: RelationModule, loader: DataLoader[GraphBatch]) -> list[list[int]]:
    """Return the rank of the first triplet that matches each relation, as one list per image.

    Ranks start at 0. A relation that none of the first `DEPTH` triplets matches has rank `DEPTH`.
    """
    module.eval()
    found = []
    for batch in loader:
        for prediction, target in zip(module.predictions(batch), batch.truth, strict=True):
            triplets = rank_triplets(prediction, DEPTH, 1)
            finds = relation_overlaps(triplets, prediction, target, phrase=False) >= 0.5
            rank = torch.arange(len(finds))[:, None].where(finds, DEPTH)
            never = rank.new_full((1, rank.shape[1]), DEPTH)
            found.append(torch.cat((rank, never)).amin(0).tolist())
    return found


# ---- many runs


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser("sgalign ablate", description=__doc__)
    parser.add_argument(
        "study",
        nargs="+",
        choices=studies.STUDIES,
        metavar="STUDY",
        help=f"study to run: {', '.join(studies.STUDIES)}",
    )
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="folder of a data set (default: generated scenes)")
    add("--seeds", type=int, default=4, metavar="N", help="number of seeds per table row (default: %(default)s)")
    add("--epochs", type=int, default=studies.EPOCHS, metavar="N", help="epochs per run (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the results; its runs are not repeated")
    add("--jobs", type=int, default=1, metavar="N", help="number of runs at the same time (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run `sgalign ablate STUDY --out FOLDER` and return the exit code.

    Runs that are missing from the folder are done first. Then the tables are written.
    """
    options = parser().parse_args(arguments)
    for name in ("seeds", "jobs", "epochs"):
        if (value := getattr(options, name)) < 1:
            parser().error(f"--{name} must be at least 1, got {value}")
    data = studies.data_name(options.data)
    tasks: dict[Path, tuple[Any, ...]] = {}
    # All arms run with one seed before the next seed, so partial results can be compared.
    for seed in range(options.seeds):
        for arm in (arm for name in options.study for arm in studies.STUDIES[name].arms):
            path = run_path(options.out, studies.settings(data, arm, options.epochs), seed)
            tasks[path] = options.data, arm, seed, options.epochs, path
    there = [path for path in tasks if path.exists()]
    for path in there:
        del tasks[path]
    print(f"{options.out}: {len(tasks)} runs to do, {len(there)} already done", flush=True)
    for number, (arm, result) in enumerate(_results(list(tasks.values()), options.jobs), 1):
        test = {name: f"{100 * result['test'][name]:.1f}" for name in ("R@50", "mR@50")}
        of = f"{number}/{len(tasks)} {arm.name}, seed {result['seed']}"
        print(f"{of}: test R@50 {test['R@50']}, mR@50 {test['mR@50']}, {result['seconds']} s", flush=True)
    studies.tabulate(options.out, options.study, data, options.epochs)
    return 0


def _results(tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[studies.Arm, Run]]:
    """Execute the runs, and yield the arm and the result of each run as soon as it completes.

    Args:
        tasks: arguments of `run` for each run.
        jobs: number of runs at the same time.
    """
    if jobs == 1:
        yield from ((task[1], run(*task)) for task in tasks)
        return
    # Small operations gain little from threads. Several runs in parallel, with one thread each, are faster.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, *task): task[1] for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # otherwise all other runs would be done first
            raise
