"""The studies that `sgalign ablate` runs and `sgalign report` shows in tables."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgalign.errors import InputError
from sgalign.files import written_whole
from sgalign.metrics import comparison
from sgalign.metrics.runs import Run, read_runs
from sgalign.training import (
    AlignMotifsModule,
    AveragedTeacherModule,
    GrowingMaskModule,
    MaskedMotifsModule,
    MotifsModule,
)

ANNOTATIONS = (  # files of VRD, of VG150 and of COCO with relations
    *("annotations_*.json", "objects.json", "predicates.json"),
    *("VG-SGG*", "*dicts*.json", "image_data.json"),
    *("train.json", "val.json", "test.json", "rel.json"),
)


class Arm(NamedTuple):
    """An arm of a study, which is one row of its table.

    Attributes:
        name: name of the row.
        base: name of the row that it is compared with. If empty, the row is not compared.
        module: name of its class in `MODULES`.
        options: options that differ from the module's defaults.
        data: arguments of `ScarceData` that differ from its defaults.
    """

    name: str
    base: str
    module: str
    options: dict[str, Any]
    data: dict[str, Any]


class Study(NamedTuple):
    """A comparison of arms, and its title."""

    title: str
    arms: list[Arm]


EPOCHS = 5
# The mean recall of the paper's baseline is far above that of plain Motifs, so its training must be rebalanced somehow.
BALANCED: dict[str, Any] = {"predicate_weights": "inverse_frequency"}
SEEN: dict[str, Any] = BALANCED | {"vision": "cached", "relation_dim": 256}


def motifs(name: str = "Motifs", base: str = "", **options: Any) -> Arm:
    """Return an arm of Motifs with these options."""
    return Arm(name, base, "MotifsModule", options, {})


def align(name: str = "Align-Motifs", base: str = "Motifs", **options: Any) -> Arm:
    """Return an arm of Align-Motifs with these options."""
    return Arm(name, base, "AlignMotifsModule", options, {})


def _pairs(kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> list[Arm]:
    """Return two arms, Motifs and Align-Motifs, for each combination of data and options.

    Align-Motifs is compared with Motifs of the same combination, and Motifs with Motifs of the first combination.

    Args:
        kinds: data and options of each combination, by name.
    """
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
        "Masking ratio p at loss weight 10 (the supplement's Table 1)",
        [motifs(**BALANCED)] + [align(f"p = {p:g}", mask_ratio=p, **BALANCED) for p in (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)],
    ),
    "loss-weight": Study(
        "Loss weight at p = 0.1 (the supplement's Table 2)",
        [motifs(**BALANCED)]
        + [
            align(f"weight = {w:g}", mask_ratio=0.1, alignment_weight=w, **BALANCED)
            for w in (0.1, 1.0, 10.0, 50.0, 100.0)
        ],
    ),
    "controls": Study(
        "Controls: the method with one part removed or changed",
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
        "Plain cross-entropy: scale of the loss, and tied or untied head of the mirror",
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
        "Cached image features",
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
        "Remedies for the long tail",
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


MODULES = {
    kind.__name__: kind
    for kind in (MotifsModule, AlignMotifsModule, MaskedMotifsModule, AveragedTeacherModule, GrowingMaskModule)
}


def settings(data: str, arm: Arm, epochs: int) -> dict[str, Any]:
    """Return the settings that, together with the seed, identify a run.

    Arms of different studies that have equal settings share their runs.

    Args:
        data: name of the data, as `data_name` returns it.
        arm: arm of any study.
        epochs: number of training epochs.
    """
    defaults = dataclasses.asdict(MODULES[arm.module].options_type())
    return {"module": arm.module, "data": data, "epochs": epochs, **defaults, **arm.options, **arm.data}


def data_name(root: str | None) -> str:
    """Return a unique name of the data, made of the folder's name and a digest of its annotations.

    Cached features are not part of the digest. Only the name of their folder distinguishes them.

    Args:
        root: folder of the data. If None, the generated scenes.
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


def tabulate(folder: Path, names: Sequence[str] | None, data: str | None, epochs: int | None) -> None:
    """Write tables and figures of studies to the folder of their runs, and print the tables.

    Args:
        folder: folder written by `sgalign ablate`.
        names: names of `STUDIES`. If None, all studies with a run for every row.
        data: name of the data, as `data_name` returns it. If None, all runs must be of the same data.
        epochs: number of epochs. If None, all runs must have the same number.

    Raises:
        FileNotFoundError: if the folder has no runs, if no study has a run for every row, or if a named study has no
            runs.
        ValueError: if no run has the given `data` or `epochs`, if either is None and the runs have several, or if a
            file is not a run.
    """
    runs = read_runs(folder)
    if not runs:
        raise FileNotFoundError(
            f"{folder}: must be a folder that sgalign ablate has written, but {folder / 'runs'} has no runs"
        )
    data = _only(runs, "data", data)
    epochs = _only([run for run in runs if run["settings"]["data"] == data], "epochs", epochs)
    found = {name: runs_by_arm(runs, STUDIES[name], data, epochs) for name in names or STUDIES}
    studies = {name: arms for name, arms in found.items() if names or len(arms) == len(STUDIES[name].arms)}
    if names and (missing := [name for name in names if not found[name]]):
        raise FileNotFoundError(f"{folder} has runs, but none of the studies {', '.join(missing)}")
    if not studies:
        begun = ", ".join(name for name, arms in found.items() if arms) or "none"
        raise FileNotFoundError(f"{folder}: no study is complete. --study can select an incomplete one, from: {begun}")
    comparison.write_csv(folder / "results.csv", studies)
    lines = []
    for name, arms in studies.items():
        bases = {arm.name: arm.base for arm in STUDIES[name].arms}
        lines += [f"## {STUDIES[name].title}", "", *comparison.table(bases, arms), ""]
        comparison.draw_curves(folder / f"{name}_curves.png", arms)
        comparison.draw_predicates(folder / f"{name}_predicates.png", bases, arms)
    with written_whole(folder / "tables.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))
    print(f"numbers {folder / 'results.csv'}, tables {folder / 'tables.md'}, figures {folder}/*.png")


def _only(runs: Sequence[Run], name: str, wanted: Any) -> Any:
    """Return the wanted value of a setting, or the one that all runs share.

    Args:
        runs: runs to choose from.
        name: name of the setting.
        wanted: value that at least one run must have. If None, all runs must have the same value.

    Raises:
        ValueError: if no run has the wanted value, or if it is None and the runs have several.
    """
    there = {run["settings"].get(name) for run in runs}
    if wanted in there or (wanted is None and len(there) == 1):
        return wanted if wanted in there else there.pop()
    of = ", ".join(sorted(map(repr, there)))
    got = "none" if wanted is None else repr(wanted)
    raise InputError(f"--{name} must be one of {of}, which the runs have, got {got}")


def runs_by_arm(runs: Sequence[Run], study: Study, data: str, epochs: int) -> dict[str, list[Run]]:
    """Return the runs of each arm of a study, sorted by seed. Arms without runs are left out."""
    arms = {}
    for arm in study.arms:
        of_arm = settings(data, arm, epochs)
        if found := [run for run in runs if run["settings"] == of_arm]:
            arms[arm.name] = sorted(found, key=lambda run: run["seed"])
    return arms
