"""The runs of a study: each arm with each seed, as the config of one training run in a folder of its own."""

from __future__ import annotations

import argparse
import functools
import hashlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint

from sgalign._version import __version__
from sgalign.data.findings import counted
from sgalign.data.open import annotation_files
from sgalign.errors import InputError
from sgalign.files import read_json, write_json, written_whole
from sgalign.numbers import whole_number
from sgalign.studies.recording import BEST, LAST
from sgalign.studies.results import digest, run_folder
from sgalign.studies.study import Arm, Study
from sgalign.training.lightning_cli import CLI, make_cli

# Options that do not change what a run computes. Callbacks that write checkpoints or predictions are left out, too.
IRRELEVANT = {
    "data.init_args": {"num_workers", "root", "seed"},  # the annotations stand for `root`, and each seed is a run
    "trainer": {
        *("logger", "default_root_dir", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"),
        *("log_every_n_steps", "profiler", "enable_autolog_hparams", "model_registry"),
    },
}
# options that name a file or a folder
PATHS = {"root", "features", "detections", "detector_weights", "word_vectors", "start_from"}
MINUTES = 15  # between two checkpoints within an epoch


class Run(NamedTuple):
    """One run of a study, which is an arm with a seed.

    Attributes:
        study: name of the first study that has the run.
        arm: name of the arm in that study.
        seed: seed of weights, image order and masks.
        folder: folder of the run. Its name is a digest of `settings`, and the seed.
        config: config of `sgalign fit` and `sgalign test`.
        settings: all that determines the result, except for the seed.
    """

    study: str
    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]
    settings: dict[str, Any]

    @property
    def devices(self) -> int:
        """The number of devices that the run trains on."""
        return self.config["trainer"]["devices"]

    def write(self) -> None:
        """Write the config and the settings to the run's folder, which is made."""
        with written_whole(self.folder / "config.yaml") as partial:
            partial.write_text(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        write_json(self.folder / "settings.json", {"seed": self.seed, "settings": self.settings}, indent=1)


def plan(study: Study, out: Path, seeds: int | None = None) -> list[list[Run]]:
    """Return the runs of each arm, one list per arm, with seeds from 0.

    Args:
        study: the study.
        out: folder for the runs.
        seeds: number of seeds. If None, the study's own number.

    Raises:
        ValueError: if `sgalign fit` does not accept the options of an arm, or if two arms are the same.
    """
    runs: list[list[Run]] = []
    for arm in study.arms:
        config = resolve(study, arm)
        settings = settings_of(config, study.choose)
        for other, others in zip(study.arms, runs):
            if others[0].settings == settings:
                raise InputError(f"{study.name}: the arms {other.name!r} and {arm.name!r} must differ in some option")
        runs.append([_run(study, arm, seed, out, config, settings) for seed in range(seeds or study.seeds)])
    return runs


class _Parsed(CLI):
    """Lightning's command line, which parses the options and stops."""

    def _set_seed(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def resolve(study: Study, arm: Arm) -> dict[str, Any]:
    """Return the config of `sgalign fit` with the options of an arm, including all defaults. Paths are absolute."""
    try:
        cli = make_cli(["fit", *arm.arguments], _Parsed, parser_kwargs={"exit_on_error": False})
    except argparse.ArgumentError as error:
        raise InputError(f"{study.name}, arm {arm.name!r}: sgalign fit refuses its options: {_short(error)}") from error
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))["fit"]
    config.pop("config", None)
    for name in ("ckpt_path", "weights_only"):
        if config.pop(name, None) is not None:
            raise InputError(f"{study.name}, arm {arm.name!r}: {name} must not be set, because the study sets it")
    trainer = config["trainer"]
    given = trainer["devices"]
    trainer["devices"] = 1 if given == "auto" else whole_number(given)
    if not trainer["devices"] or trainer["devices"] < 1:
        raise InputError(
            f"{study.name}, arm {arm.name!r}: trainer.devices must be a number of at least 1, got {given!r}. To choose "
            "devices, set CUDA_VISIBLE_DEVICES"
        )
    if trainer["fast_dev_run"]:
        raise InputError(
            f"{study.name}, arm {arm.name!r}: trainer.fast_dev_run must be false, because it tests nothing"
        )
    absolute = {part: _with_paths(config[part], lambda path: str(path.resolve())) for part in ("model", "data")}
    return config | absolute


def _short(error: Exception) -> str:
    """Return the lines of jsonargparse's error that say which option is wrong, as one sentence."""
    noise = (
        "Does not validate",
        "Subtypes",
        "Errors",
        "Expected a <class 'NoneType'>",
        "Given value type",
        "Given value: N",
    )
    lines = (line.strip(" -") for line in str(error).splitlines())
    return " ".join(line for line in lines if not line.startswith(noise))


def _run(study: Study, arm: Arm, seed: int, out: Path, config: dict[str, Any], settings: dict[str, Any]) -> Run:
    folder = run_folder(out, settings, seed).resolve()
    data, trainer = config["data"], config["trainer"]
    data = data | {"init_args": data["init_args"] | {"seed": seed}}
    trainer = trainer | {
        "default_root_dir": str(folder),
        "enable_checkpointing": True,
        "logger": [
            {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "log"},
            },
            {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "tensorboard", "version": ""},
            },
        ],
        "callbacks": [*_kept_callbacks(trainer), *_callbacks(folder, study.choose)],
    }
    config = config | {"seed_everything": seed, "data": data, "trainer": trainer}
    return Run(study.name, arm.name, seed, folder, config, settings)


def _callbacks(folder: Path, choose: str) -> list[dict[str, Any]]:
    """Return the callbacks of every run. They write its result, and the checkpoints that it resumes from."""
    common = {"dirpath": str(folder), "enable_version_counter": False}
    # Two of the best are kept, because a kill can come after a new best one has replaced another, and before `last` is
    # written. The state in `last` then still names the first of the two.
    best = {"filename": f"{BEST}-{{step}}", "monitor": choose, "mode": "max", "save_top_k": 2}
    within = {"folder": str(folder), "interval": f"0:{MINUTES}:00"}
    return [
        {"class_path": "sgalign.studies.recording.RunRecorder", "init_args": {"folder": str(folder), "choose": choose}},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": common | best},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": common | {"filename": LAST}},
        {"class_path": "sgalign.studies.recording.CheckpointWithinEpoch", "init_args": within},
    ]


def _kept_callbacks(trainer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks of a config that a run keeps. It writes checkpoints of its own, and no predictions."""
    callbacks = trainer.get("callbacks") or []
    return [
        callback
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if not issubclass(pkgutil.resolve_name(callback["class_path"]), ModelCheckpoint | BasePredictionWriter)
    ]


# ---- identity


def settings_of(config: Mapping[str, Any], choose: str) -> dict[str, Any]:
    """Return all that determines the result of a run, except for its seed.

    A file or a folder in the options is replaced by a digest of its content, and the data by a digest of its
    annotations. Options that do not change the result are left out (`IRRELEVANT`).

    Args:
        config: the config of the run, as `resolve` returns it.
        choose: name of the figure that chooses the weights.
    """
    data, trainer = config["data"], config["trainer"]
    root = data["init_args"].get("root")
    init_args = {k: v for k, v in data["init_args"].items() if k not in IRRELEVANT["data.init_args"]}
    kept = {k: v for k, v in trainer.items() if k not in IRRELEVANT["trainer"]}
    # Paths of callbacks are not replaced, because callbacks write files, and the identity must stay the same.
    return {
        "model": _with_paths(config["model"], fingerprint),
        "data": {
            "annotations": annotations_of(root),
            "class_path": data["class_path"],
            "init_args": _with_paths(init_args, fingerprint),
        },
        "trainer": kept | {"callbacks": _kept_callbacks(trainer)},
        "choose": choose,
        "sgalign": __version__,
    }


def annotations_of(root: str | None) -> str:
    """Return a digest of the annotations of a data set.

    Args:
        root: folder of the data. If None, the generated scenes.

    Raises:
        FileNotFoundError: if there is no such folder, or if it has no files of a known layout.
    """
    if root is None:
        return "generated scenes"
    return digest([[str(path.relative_to(root)), fingerprint(path)] for path in annotation_files(root)])


@functools.cache
def fingerprint(path: Path) -> str:
    """Return a digest of a file's content, or of the names, sizes, beginnings and ends of the files in a folder.

    Folders of cached features are too large to be read as a whole.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest([[str(file.relative_to(path)), file.stat().st_size, _ends(file)] for file in files])
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()[:12]


def _ends(path: Path) -> str:
    """Return a digest of the first and the last 64 KiB of a file."""
    with path.open("rb") as file:
        ends = hashlib.sha256(file.read(1 << 16))
        file.seek(max(path.stat().st_size - (1 << 16), 0))
        ends.update(file.read())
    return ends.hexdigest()


def _with_paths(value: Any, replace: Callable[[Path], str], key: str = "") -> Any:
    """Return a part of a config with every existing file or folder in it replaced by `replace(path)`."""
    if isinstance(value, dict):
        return {name: _with_paths(entry, replace, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_with_paths(entry, replace) for entry in value]
    # A single word such as "adam" is an option's value, even if a file has this name.
    may_be = isinstance(value, str) and (key in PATHS or "/" in value or "." in value)
    return replace(Path(value)) if may_be and Path(value).exists() else value


# ---- the record of a plan


def record(study: Study, runs: Sequence[Sequence[Run]], out: Path) -> None:
    """Write the runs of a study to a file in `out`, from which the report is made. Earlier runs are counted and named.

    Args:
        study: the study.
        runs: the runs of each arm, as `plan` returns them.
        out: folder for the runs.
    """
    path = out / "studies" / f"{study.name}.json"
    arms = [
        {"name": arm.name, "base": arm.base, "runs": [run.folder.name for run in of_arm]}
        for arm, of_arm in zip(study.arms, runs, strict=True)
    ]
    content = {"title": study.title, "choose": study.choose, "arms": arms}
    if path.is_file():
        try:
            before = {str(run) for arm in read_json(path)["arms"] for run in arm["runs"]}
        except (InputError, KeyError, TypeError):
            print(f"{path} was damaged and is written again")
            before = set()
        if gone := sorted(before - {run for arm in arms for run in arm["runs"]}):
            print(
                f"{study.name}: {counted(len(gone), 'run')} of an earlier plan stay in {out / 'runs'}, but are not in "
                f"the tables: {', '.join(gone[:3])}{' ...' if len(gone) > 3 else ''}"
            )
    write_json(path, content, indent=1)
