"""Trains variants of Motifs with several seeds each, run by run, and tables what they reach."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from sgalign.data import GraphBatch, SceneGraph
from sgalign.datamodule import SceneGraphData
from sgalign.metrics.matching import rank_triplets, relation_overlaps
from sgalign.training import AlignMotifsModule, MotifsModule, RelationModule

DEPTH = 100  # of the ranks that are kept


class Arm(NamedTuple):
    """A row of a table: the name, whether it has a mirror, options of its module and of `ScarceData`."""

    name: str
    mirror: bool
    options: dict[str, Any] = {}  # noqa: RUF012
    data: dict[str, Any] = {}  # noqa: RUF012


class Study(NamedTuple):
    """Arms that are compared, the first being what the others are compared with."""

    title: str
    epochs: int
    arms: list[Arm]


def _align(name: str, **options: Any) -> Arm:
    return Arm(name, True, options)


# The paper's baseline has far more mean recall than plain Motifs, so that it must be rebalanced somehow.
BALANCED = {"predicate_weights": "inverse_frequency"}
STUDIES = {
    "masking-ratio": Study(
        "Masking ratio p at loss weight 10 (the supplement's Table 1)",
        8,
        [
            Arm("Motifs", False, BALANCED),
            *(_align(f"p = {p}", mask_ratio=p, **BALANCED) for p in (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)),
        ],
    ),
    "loss-weight": Study(
        "Loss weight at p = 0.1 (the supplement's Table 2)",
        8,
        [
            Arm("Motifs", False, BALANCED),
            *(_align(f"weight = {w}", alignment_weight=w, **BALANCED) for w in (0.1, 1.0, 10.0, 50.0, 100.0)),
        ],
    ),
}


class ScarceData(SceneGraphData):
    """A data set whose training part is made worse, the same way in every run.

    Args:
        labelled: share of the training images that keep their relations.
        unlabelled: whether the others are trained on without labels, or not at all.
        missing: share of the relations that were not annotated.
        wrong: share of the relations whose predicate is another relation's.
        data: the arguments of `SceneGraphData`.
    """

    def __init__(
        self,
        *args: Any,
        labelled: float = 1.0,
        unlabelled: bool = True,
        missing: float = 0.0,
        wrong: float = 0.0,
        **data: Any,
    ) -> None:
        super().__init__(*args, **data)
        generator = torch.Generator().manual_seed(0)
        graphs = self.train
        order = torch.randperm(len(graphs), generator=generator).tolist()
        cut = round(labelled * len(graphs))
        predicates = torch.cat([graph.relations for graph in graphs])[:, 2]
        self.unlabelled = [_with(graphs[i], graphs[i].relations[:0]) for i in order[cut:]] if unlabelled else []
        self.train = []
        for index in sorted(order[:cut]):
            relations = graphs[index].relations.clone()
            other = predicates[torch.randint(len(predicates), (len(relations),), generator=generator)]
            is_wrong = torch.rand(len(relations), generator=generator) < wrong
            relations[is_wrong, 2] = other[is_wrong]
            relations = relations[torch.rand(len(relations), generator=generator) >= missing]
            if len(relations):
                self.train.append(_with(graphs[index], relations))

    def train_dataloader(self) -> DataLoader[GraphBatch]:
        loader = super().train_dataloader()
        if not self.unlabelled:
            return loader
        sampler = torch.utils.data.RandomSampler(
            range(len(self.train) + len(self.unlabelled)), generator=torch.Generator().manual_seed(self.seed)
        )
        ids = {graph.image_id for graph in self.unlabelled}
        loader = self._loader([*self.train, *self.unlabelled], sampler=sampler)
        loader.collate_fn = partial(_collate_without_labels, loader.collate_fn, ids)
        return loader


def _with(graph: SceneGraph, relations: Tensor) -> SceneGraph:
    return SceneGraph(graph.image_id, graph.width, graph.height, graph.boxes, graph.labels, relations, graph.image)


def _collate_without_labels(collate: Any, ids: set[str], graphs: Sequence[SceneGraph]) -> GraphBatch:
    """A batch where images of `ids` have no target: rows of 0, which the supervised loss does not count."""
    batch = collate(graphs)
    labelled = torch.tensor([image_id not in ids for image_id in batch.image_ids])
    return batch._replace(targets=batch.targets * labelled[batch.images[batch.pairs[:, 0]], None])


# ---- one run


class _Curve(Callback):
    """Validation figures after each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RelationModule)
        self.epochs.append({k: round(float(v), 5) for k, v in pl_module.recall.compute().items() if "/" not in k})


def run(root: str | None, arm: Arm, seed: int, epochs: int, path: Path) -> dict[str, Any]:
    """Trains and evaluates one arm with one seed, and writes what it reached to `path`, which appears when complete."""
    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(seed, verbose=False)
    start = time.monotonic()
    data = ScarceData(root, seed=seed, **arm.data)
    module = (AlignMotifsModule if arm.mirror else MotifsModule)(**arm.options)
    curve = _Curve()
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve],
    )
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    result = {
        "arm": arm.name,
        "seed": seed,
        "settings": settings(arm, epochs),
        "seconds": round(time.monotonic() - start),
        "curve": curve.epochs,
        "test": {name: round(value.item(), 5) for name, value in module.recall.compute().items()},
        "groups": {
            group: [data.predicate_names[predicate] for predicate in predicates]
            for group, predicates in data.predicate_groups.items()
        },
        "predicates": [graph.relations[:, 2].tolist() for graph in data.test],
        "ranks": ranks(module, data.test_dataloader()),
    }
    partial_path = path.with_suffix(f".{os.getpid()}.partial")
    partial_path.write_text(json.dumps(result) + "\n")
    partial_path.replace(path)
    return result


def settings(arm: Arm, epochs: int) -> dict[str, Any]:
    return {"mirror": arm.mirror, "epochs": epochs, **arm.options, **arm.data}


@torch.no_grad()
def ranks(module: RelationModule, loader: DataLoader[GraphBatch]) -> list[list[int]]:
    """Of each image the rank from 0, at most `DEPTH`, of the first triplet that finds each relation."""
    module.eval()
    found = []
    for batch in loader:
        for prediction, target in zip(module.predictions(batch), batch.truth, strict=True):
            triplets = rank_triplets(prediction, DEPTH, 1)
            finds = relation_overlaps(triplets, prediction, target, phrase=False) >= 0.5
            never = torch.ones_like(finds[:1].sum(0, keepdim=True), dtype=torch.bool)
            finds = torch.cat((finds, never.expand(1, finds.shape[1])))
            rank = torch.arange(len(finds))[:, None].where(finds, DEPTH).amin(0)
            found.append(rank.where(rank < len(triplets.scores), DEPTH).tolist())
    return found


# ---- many


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgalign ablate", description=__doc__)
    parser.add_argument("study", nargs="+", choices=STUDIES, help="what to vary")
    parser.add_argument("--data", metavar="FOLDER", help="a data set; without it, the generated scenes")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="runs a row (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each training (default: the study's)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for results; a second call goes on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`sgalign ablate STUDY --out FOLDER`: whatever run is not in the folder yet is done; then come the tables."""
    options = parser().parse_args(arguments)
    for name in ("seeds", "jobs", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser().error(f"--{name} must be at least 1, got {value}")
    for name in options.study:
        study = STUDIES[name]
        if options.epochs is not None:
            study = study._replace(epochs=options.epochs)
        run_study(name, study, options.data, range(options.seeds), options.out, options.jobs)
    from sgalign.report import main as report

    return report([str(options.out)])


def run_study(name: str, study: Study, root: str | None, seeds: Sequence[int], out: Path, jobs: int) -> None:
    """Runs what is missing; the first runs of all arms before the second ones, so that a part of it says something."""
    folder = out / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for seed in seeds:
        for number, arm in enumerate(study.arms):
            path = folder / f"{number:02}_{seed}.json"
            if not path.exists():
                tasks.append((root, arm, seed, study.epochs, path))
            elif (there := json.loads(path.read_text()))["settings"] != settings(arm, study.epochs):
                raise ValueError(f"{path}: is of {there['settings']}, not {settings(arm, study.epochs)}: move it away")
    print(f"{study.title}: {len(tasks)} of {len(seeds) * len(study.arms)} runs to do", flush=True)
    for result in _results(tasks, jobs):
        test = result["test"]
        print(
            f"{result['arm']}, seed {result['seed']}: test R@50 {100 * test['R@50']:.2f}, mR@50 "
            f"{100 * test['mR@50']:.2f}, {result['seconds']} s",
            flush=True,
        )


def _results(tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from (run(*task) for task in tasks)
        return
    # Small operations gain little from threads: several runs side by side, one thread each, do more.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(run, *task) for task in tasks]):
            yield future.result()
