"""Functions that read and write checkpoints safely, and the states of random generators in them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import __version__ as lightning_version
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.overrides import TorchFunctionMode

from sgalign.errors import InputError, shown
from sgalign.files import read_tensors, written_whole
from sgalign.training.pretrained import find_pretrained, read_pretrained, shipped_models


def random_states() -> list[Tensor]:
    """Return the states of torch's generators, first the CPU's and then each GPU's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def restore_random_states(states: Sequence[Tensor]) -> None:
    """Set the states of torch's generators. States of GPUs that this machine lacks are ignored."""
    try:
        for number, state in enumerate(states):
            if number == 0:
                torch.set_rng_state(state)
            elif number <= torch.cuda.device_count():
                torch.cuda.set_rng_state(state, number - 1)
    except RuntimeError as error:
        raise InputError(f"ckpt_path must have states of torch's random generators ({error})") from error


class WholeCheckpointIO(TorchCheckpointIO):
    """A checkpoint writer that replaces the old file only when the new one is complete.

    It writes to a temporary file first, so the old checkpoint survives a full disk or a kill.

    Weights that are not finite are never written. Normally, `SavedModule` raises an error about them. If another error
    has already stopped the run and Lightning saves a last checkpoint, the checkpoint is skipped without a second error.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint. Lightning's own writer handles paths that contain `://`."""
        if sys.exc_info()[0] is not None and (names := not_finite(checkpoint.get("state_dict", {}))):
            rank_zero_info(f"{path} is not written, because these weights are not finite: {some_of(names)}")
            return
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Lightning's own writer would leave its file in the folder for temporary files after a kill. torch.save to the
        # file itself would hide the error of a full disk.
        with written_whole(path) as partial:
            content = io.BytesIO()
            torch.save(checkpoint, content)
            partial.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, location: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, or a model's folder for evaluation. Lightning's own reader handles checkpoints.

        Unless `weights_only` is False, only tensors and plain values are unpickled, also from a URL.
        """
        if "://" in str(path) or Path(path).is_file():
            return super().load_checkpoint(path, map_location, weights_only is not False)
        return read_checkpoint(path) | {"pytorch-lightning_version": lightning_version}


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold infinity or NaN.

    If all tensors are finite, the host waits for the device only once.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if get_total_norm(list(floating.values()), float("inf")).isfinite():
        return []
    return [name for name, tensor in floating.items() if not tensor.isfinite().all()]


def check_weights(weights: Mapping[str, Tensor], step: int) -> None:
    """Raise InputError if any weights are not finite. The error names them."""
    if names := not_finite(weights):
        remedy = ". Lower learning_rate and resume from an earlier checkpoint" if step else ""
        raise InputError(f"weights must be finite, but at step {step} these are not finite: {some_of(names)}{remedy}")


class _Counted(TorchFunctionMode):
    """Count the tensors that this thread makes in a block. Raise InputError if there are too many."""

    def __init__(self, most: int, error: str) -> None:
        super().__init__()
        self.made, self.most, self.error = 0, most, error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func in (torch.empty, torch.ones, torch.zeros)  # every layer with weights calls one of these
        if self.made > self.most:
            raise InputError(self.error)
        return func(*args, **(kwargs or {}))


@contextmanager
def only_shapes(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Make the layers of a block without memory. Raise InputError if they need far more weights than a checkpoint has.

    A checkpoint's options may name layers of any size and number. Their shapes can be compared before they need memory.

    Args:
        weights: the checkpoint's weights. The block may make ten times as many tensors, because it makes some layers
            twice. It may always make 10,000. If the checkpoint lacks a few weights, a later check names one of them.
    """
    most = max(10 * len(weights), 10_000)
    error = f"options, or DETR's config, must name at most {most} weights, because the checkpoint has {len(weights)}"
    with torch.device("meta"), _Counted(most, error):
        yield


def check_same_weights(weights: Mapping[str, Tensor], of_model: Mapping[str, Tensor], model: str) -> None:
    """Raise InputError unless a checkpoint's weights are finite and have the names and shapes of a model's.

    Args:
        weights: weights of the checkpoint.
        of_model: weights of the model, also on the meta device.
        model: name of the model for the error.
    """
    for name, own in of_model.items():
        if name in weights and weights[name].is_floating_point() != own.is_floating_point():
            types = f"{name} has type {weights[name].dtype} instead of {own.dtype}"
            raise InputError(f"checkpoint must come from a model with the same options, but its {types}")
        if name in weights and weights[name].shape != own.shape:
            shapes = f"{name} has shape {list(weights[name].shape)} instead of {list(own.shape)}"
            raise InputError(f"checkpoint must come from a model with the same options, but its {shapes}")
    if differing := sorted(of_model.keys() ^ weights.keys()):
        what = f"{'lacks' if differing[0] in of_model else 'has'} {differing[0]}"
        raise InputError(f"checkpoint must have the same weights as {model}, but it {what}")
    if names := not_finite(weights):
        raise InputError(f"checkpoint must have finite weights, but these are not finite: {some_of(names)}")


def some_of(names: Sequence[Any]) -> str:
    """Return the first four names as text, followed by the number of remaining names."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(str, names[:4])) + more


def read_checkpoint(source: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint or of a model's folder.

    From a checkpoint, only tensors and plain values are unpickled.

    Args:
        source: a checkpoint that this package saved, or one of the sources of `find_pretrained`: a folder that
            `sgalign export` wrote, the name of a model that comes with the package, or its id on the Hugging Face Hub.

    Raises:
        FileNotFoundError: if there is no such file, folder or model.
        ValueError: if the file is not a checkpoint, is cut short or was written by another program.
    """
    if not Path(source).is_file():
        folder = find_pretrained(source)
        if folder is None:
            raise FileNotFoundError(
                f"{source}: no such checkpoint. It must be a file of sgalign fit, a folder of sgalign export, a model "
                f"that comes with the package ({', '.join(shipped_models())}), or owner/name on the Hugging Face Hub"
            )
        return read_pretrained(folder)
    checkpoint = read_tensors(source, "checkpoint")
    check_ours(checkpoint, str(source))
    return checkpoint


def check_ours(checkpoint: Any, what: str) -> None:
    """Raise InputError unless a checkpoint has the entries that all checkpoints of this package have.

    Args:
        checkpoint: the content of the file.
        what: the checkpoint's name in the error.
    """
    saved = checkpoint.get("sgalign") if isinstance(checkpoint, dict) else None
    if not isinstance(saved, dict) or not saved.keys() >= {"module", "object_names", "predicate_names"}:
        raise InputError(f"{what}: must be a checkpoint that sgalign fit has written, but it has no class names")
    for kind in ("object_names", "predicate_names"):
        check_names(what, kind, saved[kind])
    missing = {"run_seed", "random_states"} - saved.keys() | {"state_dict", "hyper_parameters"} - checkpoint.keys()
    if missing:
        raise InputError(
            f"{what}: must be a checkpoint that sgalign fit has written, but it lacks {', '.join(sorted(missing))}"
        )
    states, seed = saved["random_states"], saved["run_seed"]
    if not isinstance(states, list) or not all(isinstance(one, Tensor) and one.dtype == torch.uint8 for one in states):
        raise InputError(f"{what}: random_states must be a list of tensors of type uint8, got {shown(states)}")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise InputError(f"{what}: run_seed must be a whole number from 0 to 2^64 - 1, got {shown(seed)}")
    weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise InputError(f"{what}: state_dict must be tensors by name, got {shown(weights)}")
    for name in ("state_dict", "hyper_parameters", "datamodule_hyper_parameters"):
        values = checkpoint.get(name, {})
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise InputError(f"{what}: {name} must be a dict with names as keys, got {shown(values)}")


def check_names(what: str, kind: str, names: Any) -> None:
    """Raise InputError unless the names of classes are a list of different texts."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{what}: must have {kind}, a list of names, got {shown(names)}")
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise InputError(f"{what}: the names in {kind} must differ, but {twice!r} occurs twice")
