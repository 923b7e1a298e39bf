"""Trains variants of Motifs with several seeds each, run by run, and tables what they reach."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from sgalign.alignment import relation_alignment_loss
from sgalign.data import GraphBatch, SceneGraph
from sgalign.datamodule import SceneGraphData
from sgalign.files import check_writable, write_json
from sgalign.metrics.matching import rank_triplets, relation_overlaps
from sgalign.training import AlignMotifsModule, MotifsModule, RelationModule

DEPTH = 100  # of the ranks that are kept
ANNOTATIONS = (  # files of VRD, of VG150 and of COCO with relations
    *("annotations_*.json", "objects.json", "predicates.json"),
    *("VG-SGG*", "*dicts*.json", "image_data.json"),
    *("train.json", "val.json", "test.json", "rel.json"),
)


class Arm(NamedTuple):
    """A row of a table.

    Attributes:
        name: of the row.
        base: name of the row that it is compared with; empty for none.
        module: of `MODULES`.
        options: of the module.
        data: of `ScarceData`.
    """

    name: str
    base: str
    module: str
    options: dict[str, Any]
    data: dict[str, Any]


class Study(NamedTuple):
    """Arms that are compared."""

    title: str
    arms: list[Arm]


EPOCHS = 5
# The paper's baseline has far more mean recall than plain Motifs, so that it must be rebalanced somehow.
BALANCED: dict[str, Any] = {"predicate_weights": "inverse_frequency"}
SEEN: dict[str, Any] = BALANCED | {"vision": "cached", "relation_dim": 256}


def motifs(name: str = "Motifs", base: str = "", **options: Any) -> Arm:
    return Arm(name, base, "MotifsModule", options, {})


def align(name: str = "Align-Motifs", base: str = "Motifs", **options: Any) -> Arm:
    return Arm(name, base, "AlignMotifsModule", options, {})


def _pairs(kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> list[Arm]:
    """Motifs and Align-Motifs with the data and the options of each kind; Motifs is compared with that of the first."""
    arms: list[Arm] = []
    for kind, (data, options) in kinds.items():
        base = motifs(f"Motifs, {kind}", arms[0].name if arms else "", **options)
        arms += [base._replace(data=data), align(f"Align-Motifs, {kind}", base.name, **options)._replace(data=data)]
    return arms


STUDIES = {
    "learning-rate": Study(
        "Learning rate",
        _pairs({f"{rate:g}": ({}, BALANCED | {"learning_rate": rate}) for rate in (1e-3, 5e-4, 2e-3)}),
    ),
    "masking-ratio": Study(
        "Masking ratio p at loss weight 10: the supplement's Table 1",
        [motifs(**BALANCED)] + [align(f"p = {p:g}", mask_ratio=p, **BALANCED) for p in (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)],
    ),
    "loss-weight": Study(
        "Loss weight at p = 0.1: the supplement's Table 2",
        [motifs(**BALANCED)]
        + [
            align(f"weight = {w:g}", mask_ratio=0.1, alignment_weight=w, **BALANCED)
            for w in (0.1, 1.0, 10.0, 50.0, 100.0)
        ],
    ),
    "controls": Study(
        "Controls: what remains when a part of the method is taken away",
        [
            motifs(**BALANCED),
            align(**BALANCED),
            align("mirror unmasked", mask_ratio=0.0, **BALANCED),
            align("mirror trained by cross-entropy alone", alignment_weight=0.0, supervise_mirror=True, **BALANCED),
            Arm("no mirror, its masking as dropout", "Motifs", "MaskedMotifsModule", BALANCED, {}),
            motifs("half the learning rate", "Motifs", learning_rate=5e-4, **BALANCED),
            align("loss as mean over relations, tied head", reduction="relation", tied_head=True, **BALANCED),
            align("mask of single features", mask_granularity="feature", **BALANCED),
            align("symmetric loss", direction="symmetric", **BALANCED),
            Arm("averaged teacher", "Motifs", "AveragedTeacherModule", BALANCED, {}),
        ],
    ),
    "unbalanced": Study(
        "Plain cross-entropy: how the loss is scaled, and whether the mirror has a head of its own",
        [
            motifs(),
            align(),
            align("mean over relations, weight 1", reduction="relation", alignment_weight=1.0),
            align("mean over relations, weight 10", reduction="relation"),
            align("mean over relations, weight 10, tied head", reduction="relation", tied_head=True),
        ],
    ),
    "scarce": Study(
        "Fewer and worse labels",
        _pairs(
            {
                "all labels": ({}, BALANCED),
                "10 % of images labelled, no others": ({"labelled": 0.1, "unlabelled": False}, BALANCED),
                "10 % of images labelled, others seen": ({"labelled": 0.1}, BALANCED),
                "half of the relations missing": ({"missing": 0.5}, BALANCED),
                "30 % of the labels wrong": ({"wrong": 0.3}, BALANCED),
            }
        ),
    ),
    "image-features": Study(
        "What images show: from cached features",
        [
            arm._replace(data={"features": "features"})
            for arm in (
                motifs(**SEEN),
                align("p = 0.1", mask_ratio=0.1, **SEEN),
                align("p = 0.4", mask_ratio=0.4, **SEEN),
                Arm("p growing to 0.4", "Motifs", "GrowingMaskModule", SEEN | {"mask_ratio": 0.4}, {}),
                align("mirror unmasked", mask_ratio=0.0, **SEEN),
                align("mirror trained by cross-entropy alone", alignment_weight=0.0, supervise_mirror=True, **SEEN),
                Arm("no mirror, its masking as dropout", "Motifs", "MaskedMotifsModule", SEEN, {}),
            )
        ]
        + [motifs("labels and boxes only", "Motifs", **BALANCED)],
    ),
    "long-tail": Study(
        "Means against the long tail",
        _pairs(
            {
                "plain": ({}, {}),
                "frequency^-0.5": ({}, BALANCED),
                "frequency^-1": ({}, BALANCED | {"predicate_weight_power": 1.0}),
                "effective number": ({}, {"predicate_weights": "effective_number"}),
                "repeated images": ({"repeat_threshold": 0.13}, {}),
                "repeated images, instances dropped": ({"repeat_threshold": 0.13, "instance_drop": 1.6}, {}),
                "logits adjusted in training": ({}, {"logit_adjustment": 0.5}),
                "logits adjusted at test": ({}, {"logit_adjustment_test": 0.5}),
            }
        ),
    ),
}


class ScarceData(SceneGraphData):
    """A data set whose training part is made worse, the same way in every run.

    Args:
        root: of `SceneGraphData`.
        features: name of a folder in `root` that `sgalign cache-features` has filled.
        labelled: share of the training images that keep their relations.
        unlabelled: whether the others are trained on without labels, or not at all.
        missing: share of the relations that were not annotated.
        wrong: share of the relations whose predicate is another relation's.
        data: the arguments of `SceneGraphData`.

    Raises:
        ValueError: there are features, but no root that they could be in.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        features: str | None = None,
        labelled: float = 1.0,
        unlabelled: bool = True,
        missing: float = 0.0,
        wrong: float = 0.0,
        **data: Any,
    ) -> None:
        if features is not None and root is None:
            raise ValueError(f"data must be a folder with cached features in {features}/, got the generated scenes")
        super().__init__(root, features=features and str(Path(root or "", features)), **data)
        generator = torch.Generator().manual_seed(0)
        for name in ("predicate_groups", "zero_shot_validation", "zero_shot_test"):
            getattr(self, name)  # kept from here on: what figures are of does not depend on what is trained on
        for part in ("train", "validation", "test"):
            if not any(len(graph.relations) for graph in getattr(self, part)):
                raise ValueError(f"{self.name}: must have relations in its {part} part, has none")
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


class MaskedMotifsModule(AlignMotifsModule):
    """A control: Motifs trained on what a mirror would see, without the other branch.

    Of the mirror's options `mask_ratio` counts.
    """

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.see(batch, batch_index)
        dropped = self.draw_mask(batch, batch_index)
        _, masked_logits = self.network.dual_branch(batch, self.network.predicate, dropped=dropped)
        loss, _ = self.relation_loss(masked_logits, batch.targets)
        return loss, {"loss": loss}


class AveragedTeacherModule(AlignMotifsModule):
    """A control: the mirror is aligned with what an average of earlier weights predicts (mean teacher).

    Of the mirror's options `mask_ratio` and `alignment_weight` count.
    """

    def make_network(self, counts: Tensor) -> None:
        super().make_network(counts)
        average = get_ema_multi_avg_fn(0.99)
        self.teacher = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True).requires_grad_(False)

    def losses(self, batch: GraphBatch, batch_index: int) -> tuple[Tensor, dict[str, Tensor]]:
        batch = self.see(batch, batch_index)
        dropped = self.draw_mask(batch, batch_index)
        prediction, mirrored_logits = self.network.dual_branch(batch, self.mirrored_head, dropped=dropped)
        teacher = self.teacher.eval()(batch).logits
        loss, parts = self.supervised_loss(prediction, batch)
        parts["alignment"] = relation_alignment_loss(teacher, mirrored_logits)
        return loss + self.options.alignment_weight * parts["alignment"], parts

    def on_train_batch_end(self, *args: Any) -> None:
        self.teacher.update_parameters(self.network)


class GrowingMaskModule(AlignMotifsModule):
    """A curriculum: p grows from 0 to its value from the first step to the last."""

    @property
    def mask_ratio(self) -> float:
        return self.options.mask_ratio * self.global_step / self.trainer.estimated_stepping_batches


MODULES = {
    kind.__name__: kind
    for kind in (MotifsModule, AlignMotifsModule, MaskedMotifsModule, AveragedTeacherModule, GrowingMaskModule)
}


# ---- one run


class _Best(Callback):
    """Validation figures after each epoch, and the weights of the best by SGTR's number, (R@100 + mR@100) / 2."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.epoch = 0
        self.weights: dict[str, Tensor] = {}

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RelationModule)
        figures = pl_module.recall.compute().items()
        names = pl_module.predicate_names
        self.epochs.append({k: round(v.item(), 5) for k, v in figures if k.partition("/")[2] not in names})
        number = [epoch["R@100"] + epoch["mR@100"] for epoch in self.epochs]
        if number[-1] == max(number):
            self.epoch = len(number)
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def run(root: str | None, arm: Arm, seed: int, epochs: int, path: Path) -> dict[str, Any]:
    """Trains one arm with one seed and writes what its best epoch reaches to `path`, which appears when complete."""
    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    check_writable(path)
    pl.seed_everything(seed, verbose=False)
    start = time.monotonic()
    data = ScarceData(root, seed=seed, **arm.data)
    module = MODULES[arm.module](**arm.options)
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
    result = {
        "seed": seed,
        "settings": settings(data_name(root), arm, epochs),
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
    write_json(path, result)
    return result


def settings(data: str, arm: Arm, epochs: int) -> dict[str, Any]:
    """What tells runs apart, besides the seed: arms of several studies share those of the same settings.

    Args:
        data: of `data_name`.
    """
    defaults = dict(MODULES[arm.module]().hparams)
    return {"module": arm.module, "data": data, "epochs": epochs, **defaults, **arm.options, **arm.data}


def data_name(root: str | None) -> str:
    """The folder's name and a digest of the annotations in it, which another data set of that name does not have.

    Cached features are told apart by the name of their folder alone.
    """
    if root is None:
        return "generated scenes"
    digest = hashlib.sha256()
    for path in sorted(path for pattern in ANNOTATIONS for path in Path(root).glob(pattern)):
        if path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return f"{Path(root).resolve().name} {digest.hexdigest()[:12]}"


def run_path(folder: Path, of: dict[str, Any], seed: int) -> Path:
    """The file of a run of these `settings`."""
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return folder / "runs" / f"{digest[:12]}_{seed}.json"


@torch.no_grad()
def ranks(module: RelationModule, loader: DataLoader[GraphBatch]) -> list[list[int]]:
    """Of each image the rank from 0, at most `DEPTH`, of the first triplet that finds each relation."""
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


# ---- many


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sgalign ablate", description=__doc__)
    parser.add_argument("study", nargs="+", choices=STUDIES, metavar="STUDY", help=f"of {', '.join(STUDIES)}")
    parser.add_argument("--data", metavar="FOLDER", help="a data set; without it, the generated scenes")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="runs a row (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for results; a second call goes on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: %(default)s)")
    return parser


def main(arguments: Sequence[str]) -> int:
    """`sgalign ablate STUDY --out FOLDER`: whatever run is not in the folder yet is done; then come the tables."""
    options = parser().parse_args(arguments)
    for name in ("seeds", "jobs", "epochs"):
        if (value := getattr(options, name)) < 1:
            parser().error(f"--{name} must be at least 1, got {value}")
    data = data_name(options.data)
    tasks: dict[Path, tuple[Any, ...]] = {}
    # All arms with one seed before any with the next, so that a part of it says something.
    for seed in range(options.seeds):
        for arm in (arm for name in options.study for arm in STUDIES[name].arms):
            path = run_path(options.out, settings(data, arm, options.epochs), seed)
            tasks[path] = options.data, arm, seed, options.epochs, path
    there = [path for path in tasks if path.exists()]
    for path in there:
        del tasks[path]
    print(f"{options.out}: {len(tasks)} runs to do, {len(there)} are there", flush=True)
    for number, (arm, result) in enumerate(_results(list(tasks.values()), options.jobs), 1):
        test = {name: f"{100 * result['test'][name]:.1f}" for name in ("R@50", "mR@50")}
        of = f"{number}/{len(tasks)} {arm.name}, seed {result['seed']}"
        print(f"{of}: test R@50 {test['R@50']}, mR@50 {test['mR@50']}, {result['seconds']} s", flush=True)
    from sgalign import report

    report.write(options.out, options.study, data, options.epochs)
    return 0


def _results(tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[tuple[Arm, dict[str, Any]]]:
    if jobs == 1:
        yield from ((task[1], run(*task)) for task in tasks)
        return
    # Small operations gain little from threads: several runs side by side, one thread each, do more.
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, *task): task[1] for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or all the others would be done first
            raise
