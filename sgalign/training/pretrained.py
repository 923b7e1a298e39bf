"""Models as folders in the Hugging Face layout: weights, options and class names, and a model card.

A folder has no pickled objects, so reading it runs no code. It has no state of the optimizer, so a run cannot resume
from it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgalign._version import __version__
from sgalign.errors import InputError, shown
from sgalign.files import PARTIAL, folder_written_whole, read_json, real_path

SHIPPED = Path(__file__).resolve().parents[1] / "pretrained"  # one folder per model that comes with the package
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1  # of CONFIG; a change that older versions cannot read raises it
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
FIELDS = {"options": dict, "model": dict}
MODEL_FIELDS = {"module": str, "object_names": list, "predicate_names": list}
OF_RUNS = {"run_seed", "random_states"}  # what only a run that resumes needs from the entry `sgalign` of a checkpoint


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    names = (path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))
    return sorted(name for name in names if not name.endswith(PARTIAL))


def find_pretrained(source: str | Path) -> Path | None:
    """Return the folder of a model, or None if there is none.

    Args:
        source: a folder, the name of a model that comes with the package, or `owner/name` or `owner/name@revision` for
            a model on the Hugging Face Hub, which is then downloaded. A local path wins over the others.

    Raises:
        ValueError: if the model cannot be downloaded.
    """
    path, name = Path(source), str(source)
    if path.is_dir() and ((path / CONFIG).exists() or name not in shipped_models()):
        return path
    if name in shipped_models():
        return SHIPPED / name
    match = HUB_ID.fullmatch(name) if isinstance(source, str) else None
    if match is None or path.parts[0] in (".", "..") or Path(path.parts[0]).exists() or path.suffix in (".ckpt", ".pt"):
        return None
    return _download(name, match[1], match[2])


def is_pretrained(source: str | Path) -> bool:
    """Return True for a folder that this package wrote, and for the name of a model that comes with it.

    Folders of other libraries, and names on the Hugging Face Hub, give False.
    """
    path = Path(source)
    if not path.exists():
        return str(source) in shipped_models()
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("library_name") == "sgalign"
    except (OSError, ValueError, AttributeError):
        return False


def _download(source: str, repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    print(f"sgalign: {source} is not a local path, so it is taken from the Hugging Face Hub", file=sys.stderr)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except Exception as error:  # the library raises errors of many kinds, its own and those of its HTTP client
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{source}: must be a local path or a model that the Hugging Face Hub has, but it could not be downloaded "
            f"({reason[0]})"
        ) from error


def write_pretrained(checkpoint: Mapping[str, Any], folder: str | Path, card: str) -> None:
    """Write a model as a folder. The folder appears when it is complete.

    Options that are paths are reduced to their last part, so the folder does not name those of the training machine.

    Args:
        checkpoint: the content of a checkpoint. `state_dict`, `hyper_parameters` and `sgalign` must be there. The other
            entries that `training_of` reads may be missing.
        folder: the folder, which must be new or empty.
        card: text of the model card.

    Raises:
        FileExistsError: if the folder is not empty.
        OSError: if the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: must be a new or an empty folder")
    if real_path(folder) == Path.cwd():
        raise FileExistsError(f"{folder}: must not be the current folder, because a new folder takes its place")
    config = {
        "library_name": "sgalign",
        "format": FORMAT,
        "sgalign_version": __version__,
        "torch_version": torch.__version__,
        "step": checkpoint.get("global_step", 0),
        "options": without_paths(checkpoint["hyper_parameters"]),
        "training": training_of(checkpoint),
        "model": _of_model(checkpoint["sgalign"]),
    }
    # safetensors refuses tensors that share memory.
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint["state_dict"].items()}
    try:
        with folder_written_whole(folder) as partial:
            save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            (partial / CARD).write_text(card, encoding="utf-8")
            # safetensors lets only the owner read the weights. The card has the permissions that the umask wants.
            (partial / WEIGHTS).chmod((partial / CARD).stat().st_mode)
    except SafetensorError as error:  # for example, if the disk is full
        raise OSError(f"{folder}: {error}") from error


def training_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model card tells about the run, without paths.

    The entries are the `epoch`, the options of the `data`, and the `best` value of each monitored validation figure.

    Args:
        checkpoint: the content of a checkpoint or of a folder.
    """
    if "training" in checkpoint:
        return checkpoint["training"]
    best = {
        state["monitor"]: float(state["best_model_score"])
        for state in checkpoint.get("callbacks", {}).values()
        if isinstance(state, dict)
        and isinstance(state.get("monitor"), str)
        and state.get("best_model_score") is not None
    }
    data = without_paths(checkpoint.get("datamodule_hyper_parameters", {}))
    data.pop("_instantiator", None)  # a function of Lightning
    return {"epoch": checkpoint.get("epoch"), "data": data, "best": best}


def _of_model(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `sgalign` of a checkpoint without the states of the run, and without a path in DETR's config."""
    kept = {name: value for name, value in saved.items() if name not in OF_RUNS}
    if "detector" in kept:  # the library transformers notes the folder of pretrained weights in the config
        config = re.sub(r'("_name_or_path": )"(?:[^"\\]|\\.)*"', r'\1""', kept["detector"]["config"])
        kept["detector"] = kept["detector"] | {"config": config}
    return kept


def without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which text with a slash is reduced to its last part, because it may be a path."""

    def reduced(value: Any) -> Any:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, Mapping):
            return {name: reduced(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [reduced(part) for part in value]
        return Path(value).name if isinstance(value, str) and "/" in value else value

    return {name: reduced(value) for name, value in options.items()}


def read_pretrained(folder: Path) -> dict[str, Any]:
    """Return the model in a folder in the form of a checkpoint, with its tensors on the CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged, or comes from another library or from a later version.
    """
    config = _read_config(folder)
    return {
        "state_dict": _read_weights(folder / WEIGHTS),
        "hyper_parameters": config["options"],
        "global_step": config.get("step", 0),
        "training": config["training"],
        "sgalign": config["model"] | {"run_seed": 0, "random_states": []},
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: must be a folder that sgalign export has written, but it has no {CONFIG}")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("library_name") != "sgalign":
        raise InputError(f"{path}: must be the configuration of a model of sgalign, got one of another library")
    if config.get("format") != FORMAT:
        raise InputError(
            f"{path}: format must be {FORMAT}, got {shown(config.get('format'))}: it was written by sgalign "
            f"{config.get('sgalign_version')}, and this is {__version__}"
        )
    for fields, values in ((FIELDS, config), (MODEL_FIELDS, config["model"] if "model" in config else {})):
        for name, kind in fields.items():
            if not isinstance(values, dict) or not isinstance(value := values.get(name), kind):
                got = values.get(name) if isinstance(values, dict) else values
                raise InputError(f"{path}: {name} must be a {kind.__name__}, got {shown(got)}")
            if kind is list and not all(isinstance(text, str) for text in value):
                raise InputError(f"{path}: {name} must be a list of names, got {shown(value)}")
    training = config.setdefault("training", {})
    if not isinstance(training, dict):
        raise InputError(f"{path}: training must be a dict, got {shown(training)}")
    for name in ("data", "best"):
        if not isinstance(training.get(name, {}), dict):
            raise InputError(f"{path}: training.{name} must be a dict, got {shown(training[name])}")
    for name, value in training.get("best", {}).items():
        if type(value) not in (int, float):
            raise InputError(f"{path}: training.best: {name} must be a number, got {shown(value)}")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent}: must be a folder that sgalign export has written, but has no {WEIGHTS}"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an error type of its own, and damaged sizes give others
        raise InputError(
            f"{path}: must be a complete file of safetensors, but is not one or is cut short ({error})"
        ) from error
