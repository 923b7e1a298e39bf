"""Random command lines of `sgalign`, drawn from the options that its parsers and its classes define.

A new option of a command, a module or the trainer is covered without a change here. Paths are relative to a folder in
which `in` has the files of `command_inputs.py`, and `old` has files that an output may replace.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import types
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from command_judging import OUTPUT_OPTIONS, OUTPUTS
from trainers import SMALL_DETR, SMALL_MOTIFS, SMALL_SGTR

from sgalign import training
from sgalign.commands.main import COMMANDS, TRAINER_COMMANDS
from sgalign.studies.plan import _Parsed
from sgalign.training.lightning_cli import make_cli

WHOLE = ("0", "-1", "1", "2", "3", "7", "255", "2147483648", "9223372036854775808", "1" + "0" * 30)
REAL = ("0.0", "-0.0", "-0.5", "0.5", "1.0", "1e-30", "1e308", "1e999", "nan", "inf", "-inf", ".5", "1e-3")
TEXT = ("", " ", "x", "-", "é", "\udcff", "a\nb", "%s{}", "null", "true", "[]", "[1]", "{}", "x" * 300, "../x", "a/b")
NEW = (
    "new", "new.json", "new.jsonl", "new.h5", "new.html", "new.csv", "sub/new.json", "sub/deep/new.jsonl", "new.HTML",
    "é ü.jsonl", "new\udcff.json", "old/file.json", "old/file.jsonl", "old/file.h5", "old/full", "old/empty",
    "old/file.json/new.json", "/proc/none/new.json", "/dev/null", "/dev/full", "old/link.json", "old/dangling.json",
    ".", "", "x" * 300 + ".json", "out.jsonl", "out.h5", "page.html", "out", "new.failed.jsonl",
)  # fmt: skip
WORDS = {
    "accelerator": ("cpu", "gpu", "tpu", "auto"),
    "strategy": ("auto", "ddp", "fsdp", "deepspeed", "single_device"),
    "profiler": ("simple", "advanced", "pytorch"),
    "gradient_clip_algorithm": ("norm", "value"),
    "max_time": ("00:00:00:01", '{"seconds": 1}'),
    "logger": ("true", "CSVLogger", "TensorBoardLogger", "WandbLogger"),
    "callbacks": ("RichProgressBar", "EarlyStopping", "ModelCheckpoint", "TripletWriter", "PredictionWriter"),
    "optimizer": ("Adam", "SGD", "torch.optim.AdamW"),
    "lr_scheduler": ("StepLR", "torch.optim.lr_scheduler.StepLR"),
    "ckpt_path": ("last", "best", "hpc"),
    "splits": ("train", "validation", "test"),
    "set": ("trainer.max_epochs=1", "model.mask_ratio=2", "data.root=in/coco", "model.nothing=1"),
    "study": ("small",),
    "images": ("in/coco/images", "in/coco/images/*"),
}  # words that an option of this name may mean, beyond its type
PROCESSES = {"devices", "num_nodes", "num_workers", "workers", "jobs"}  # at most 2, or the machine would be exhausted
MOTIFS = {"MotifsModule", "AlignMotifsModule", "AveragedTeacherModule", "GrowingMaskModule", "MaskedMotifsModule"}
QUIET = (
    "--data.root=in/coco --data.batch_size=2 --trainer.accelerator=cpu --trainer.max_steps=1 --trainer.logger=false "
    "--trainer.enable_progress_bar=false --trainer.enable_model_summary=false --trainer.limit_val_batches=2 "
    "--trainer.limit_test_batches=2 --trainer.limit_predict_batches=2"
).split()
SCORED = "in/predictions.h5 --annotations in/coco --protocol"
PREDICTED = "in/coco/images/0_test_0.jpg --workers 0 --checkpoint"
BASES: dict[str, tuple[str, ...]] = {
    "ablate": (
        "in/small.yaml --out study",
        "in/small.yaml --out new --dry-run",
        "in/small.yaml --out study --seeds 1",
        "in/small.yaml --out study --set trainer.max_epochs=1",
    ),
    "report": (
        "study",
        "study --study small",
        "new --checkpoint in/align_sgtr.ckpt --image in/coco/images/0_test_0.jpg",
    ),
    "compare": ("--data in/vg --epochs 1 --out new",),
    "evaluate": (
        f"{SCORED} sgdet",
        f"{SCORED} predcls",
        f"{SCORED} sgbench --csv new.csv",
        f"{SCORED} open-images",
        f"{SCORED} vrd-relationship --json new.json --detections in/detections.json",
        "--detections in/detections.json --annotations in/coco",
    ),
    "check": ("in/coco", "in/vg", "in/vrd", "in/coco --predictions in/predictions.h5 --json new.json"),
    "export": ("in/motifs.ckpt new", "in/sgtr.ckpt new --results in/results.json --license mit", "in/exported new"),
    "make-dataset": (
        "new --sizes 1 0 1",
        "new --sizes 2 1 1 --format coco",
        "new --sizes 1 1 1 --format vrd --no-images",
        "new --source in/vrd",
        "new --source in/coco --few 1 --long-side 20",
        "new --source in/vg",
    ),
    "predict": (
        "in/coco/images --workers 0 --checkpoint in/sgtr.ckpt",
        f"{PREDICTED} in/sgtr.ckpt --out new.jsonl",
        f"{PREDICTED} in/motifs.ckpt --detections in/detections.json --hdf5 new.h5 --html",
        f"{PREDICTED} in/exported --detections in/detections.json --draw --shard 1/2",
    ),
    "cache-features": ("--checkpoint in/images.ckpt --data in/coco --out new --splits test",),
    "view": (
        "in/graphs.jsonl",
        "in/coco",
        "in/graphs.jsonl --images in/coco/images --annotations in/coco --out new.html",
        "in/predictions.h5 --annotations in/coco",
    ),
    "doctor": ("",),
    "fit": ("", "--config in/motifs.yaml", "--config in/sgtr.yaml"),
    "validate": ("--config in/motifs.yaml --ckpt_path=in/motifs.ckpt",),
    "test": (
        "--config in/motifs.yaml --ckpt_path=in/motifs.ckpt",
        "--config in/sgtr.yaml --ckpt_path=in/sgtr.ckpt",
        "--model FrequencyModule",
        "--config in/motifs.yaml --ckpt_path=in/exported",
    ),
    "predict-config": (
        "--config in/motifs.yaml --ckpt_path=in/motifs.ckpt --trainer.callbacks+=TripletWriter",
        "--config in/sgtr.yaml --ckpt_path=in/sgtr.ckpt --trainer.callbacks+=PredictionWriter",
        "--config in/sgtr.yaml --ckpt_path=in/sgtr.ckpt --trainer.callbacks+=DetectionWriter",
    ),
}
# Shares of the cases. Commands that train, or whose parser takes a tenth of a second, are rarer.
SHARES = dict.fromkeys(BASES, 100) | {"doctor": 5, "compare": 1, "ablate": 20, "cache-features": 5, "report": 50}
SHARES |= {"predict": 50, "fit": 6, "validate": 2, "test": 4, "predict-config": 4}


class _Found(Exception):
    """Carries the parser of a command out of its main function."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that a command's main function uses."""

    def stop(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise _Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            importlib.import_module(f"sgalign.commands.{command.replace('-', '_')}").main([])
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{command} has no parser")


class Lines:
    """Random command lines.

    Args:
        files: the input files, as paths that begin with `in/`.
        only: the commands, as in `SHARES`. If it is empty, all commands.
    """

    def __init__(self, files: Sequence[str], only: Sequence[str] = ()) -> None:
        self.files = list(files)
        self.shares = {command: share for command, share in SHARES.items() if command in (only or SHARES)}
        commands = ["predict", *COMMANDS]
        self.actions = {name: parser_of(name)._actions for name in commands} | {"doctor": []}
        self.hints: dict[str, dict[str, Any]] = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for name in TRAINER_COMMANDS:
                row = "predict-config" if name == "predict" else name
                if row not in self.shares:
                    continue
                cli = make_cli([name, "--model", "MotifsModule"], _Parsed)
                actions = cli._subcommand_parsers[name]._actions
                own = {action.dest: action._typehint for action in actions if type(action).__name__ == "ActionTypeHint"}
                self.hints[row] = own
        kinds = [getattr(training, name) for name in training.__all__ if name.endswith("Module")]
        self.modules = {kind.__name__: get_type_hints(kind.options_type) for kind in kinds if kind.options_type.fixed}
        self.modules["FrequencyModule"] = {}
        self.data = {
            name: {k: v for k, v in get_type_hints(getattr(training, name).__init__).items() if k != "return"}
            for name in ("SceneGraphData", "ScarceData", "SimulatedData")
        }

    def line(self, seed: int, case: int) -> list[str]:
        """Return the arguments of a case."""
        draw = Random(f"{seed}:{case}")
        if draw.random() < 0.002:
            return [draw.choice(TEXT), *draw.sample(TEXT, draw.randint(0, 2))]
        command = draw.choices(list(self.shares), list(self.shares.values()))[0]
        base = draw.choice(BASES[command]).split() if draw.random() < 0.95 else []
        number = draw.choices((0, 1, 2, 3, 5), (1, 8, 8, 4, 2))[0]
        if command in self.hints:
            arguments = self._of_trainer(draw, command, base, number)
        else:
            added = [self._option(draw, command) for _ in range(number)] if self.actions[command] else []
            arguments = [*base, *(word for words in added for word in words)]
        return [command.removesuffix("-config"), *_mixed(draw, arguments)]

    def names(self, arguments: Sequence[str]) -> set[str]:
        """Return the names of the options that the config of a command line may have."""
        if not any(argument.startswith(("--config", "-c", "--data", "--model")) for argument in arguments):
            return set()
        options = [*self.modules.values(), *self.data.values(), *self.hints.values()]
        return {name.rpartition(".")[2] for group in options for name in group}

    def _option(self, draw: Random, command: str) -> list[str]:
        """Return one option of a command, or one positional argument, with a random value."""
        action = draw.choice(self.actions[command])
        flags = [flag for flag in action.option_strings if flag not in ("-h", "--help")]
        if action.option_strings and not flags:
            return ["--help"] if draw.random() < 0.05 else []
        count: Any = action.nargs
        if count in ("+", "*"):
            count = draw.randint(0 if count == "*" else 1, 3)
        count = 1 if count is None else count
        if draw.random() < 0.05:
            count = draw.randint(0, 3)
        written = (command, action.dest) in OUTPUTS or (flags and action.dest in OUTPUT_OPTIONS)
        values = [self._value(draw, action.type or str, action.dest, action.choices, written) for _ in range(count)]
        if len(flags) and len(values) == 1 and draw.random() < 0.5:
            return [f"{flags[0]}={values[0]}"]
        return [*flags[:1], *values]

    def _value(self, draw: Random, kind: Any, name: str, choices: Any = None, written: bool = False) -> str:
        if name in PROCESSES:
            return draw.choice(("0", "1", "2", "-1", "x", "", "1.5"))
        if draw.random() < 0.04:
            return draw.choice(TEXT)
        if name in WORDS and draw.random() < 0.5:
            return draw.choice(WORDS[name])
        if choices:
            return str(draw.choice(list(choices)))
        if kind is int:
            return draw.choice(WHOLE if draw.random() < 0.9 else REAL)
        if kind is float:
            return draw.choice(REAL if draw.random() < 0.7 else WHOLE)
        if name == "shard":
            return draw.choice(("1/1", "1/2", "2/2", "0/1", "3/2", "1/0", "x", "1/99999", "-1/2", "1/2/3"))
        if written:
            return draw.choice(NEW)
        return draw.choice(self.files if draw.random() < 0.85 else TEXT)

    def _of_trainer(self, draw: Random, command: str, base: list[str], number: int) -> list[str]:
        name = draw.choice(list(self.modules))
        if base and "--config" in base:
            name = {"in/motifs.yaml": "AlignMotifsModule", "in/sgtr.yaml": "SGTRModule"}[base[1]]
        elif "--model" in base:
            name = base[base.index("--model") + 1]
        else:
            base = ["--model", name, *_small(name), *base]
        hints = [("", key, hint) for key, hint in self.hints[command].items() if key not in ("model", "data")]
        of_data = draw.choice(list(self.data)) if draw.random() < 0.2 else "SceneGraphData"
        chosen = [] if of_data == "SceneGraphData" else [f"--data={of_data}"]
        kinds = [hints, list(("model.", *item) for item in self.modules[name].items()) or hints]
        kinds.append([("data.", *item) for item in self.data[of_data].items()])
        arguments = [*base, *chosen, *QUIET]
        for _ in range(number):
            prefix, key, hint = draw.choice(draw.choice(kinds))
            value = self._typed(draw, hint, key.rpartition(".")[2])
            arguments += [f"--{prefix}{key}={value}"] if draw.random() < 0.9 else [f"--{prefix}{key}", value]
        return arguments

    def _typed(self, draw: Random, hint: Any, name: str) -> str:
        """Return a value of a type hint as text, or rarely one of another type."""
        if name in PROCESSES:
            return self._value(draw, int, name)
        kind = get_origin(hint)
        if kind in (Union, types.UnionType):
            hint = draw.choice(get_args(hint))
            return "null" if hint is type(None) else self._typed(draw, hint, name)
        if kind is Literal:
            return str(draw.choice((*get_args(hint), "x")))
        if hint is bool:
            return draw.choice(("true", "false", "true", "false", "1", "yes", ""))
        if hint in (int, float, str, Path):
            return self._value(draw, hint, name, written=name in OUTPUT_OPTIONS)
        if kind is not None and (parts := [part for part in get_args(hint) if part is not Ellipsis]):
            count = draw.randint(0, 3) if len(parts) == 1 or kind is dict else len(parts)
            values = [self._typed(draw, part, name) for part in (parts * 3)[:count]]
            return "[" + ",".join(values) + "]"
        return draw.choice(WORDS[name]) if name in WORDS and draw.random() < 0.8 else draw.choice(TEXT)


def _small(name: str) -> list[str]:
    """Return the options that make a module small."""
    options: dict[str, Any] = {}
    if name in MOTIFS:
        options = SMALL_MOTIFS
    elif "SGTR" in name:
        options = SMALL_SGTR
    elif name == "EntityDetectorModule":
        options = SMALL_DETR
    elif name == "DetectorModule":
        options = {"backbone": "resnet18", "min_size": 48, "max_size": 64, "head_dim": 8}
    images = ["--data.images=true"] if "SGTR" in name or "Detector" in name else []
    return [f"--model.{key}={value}" for key, value in options.items()] + images


def _mixed(draw: Random, arguments: list[str]) -> list[str]:
    """Return the arguments, of which rarely one is left out, repeated, exchanged or added."""
    if arguments and draw.random() < 0.15:
        place, other = draw.randrange(len(arguments)), draw.randrange(len(arguments))
        action = draw.randint(0, 3)
        if action == 0:
            del arguments[place]
        elif action == 1:
            arguments.insert(other, arguments[place])
        elif action == 2:
            arguments[place], arguments[other] = arguments[other], arguments[place]
        else:
            arguments.insert(place, draw.choice(TEXT))
    return [argument for argument in arguments if "\0" not in argument]
