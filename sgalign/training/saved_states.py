"""Checks of the states that a resumed run loads from a checkpoint.

PyTorch and Lightning hardly check these states. With wrong ones, a run begins anew without a word, fails later, or
deletes files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sgalign.errors import InputError, shown
from sgalign.numbers import LARGEST_WHOLE


def _are_dicts(values: Any, *keys: str) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) and value.keys() >= set(keys) for value in values)


def _completed_steps(loops: Any) -> int | None:
    """Return the number of the optimizer's steps in the states of Lightning's loops, or None if they lack it."""
    try:
        progress = loops["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]
        steps = progress["optimizer"]["step"]["total"]["completed"]
        return steps if type(steps) is int else None
    except (IndexError, KeyError, TypeError):
        return None


def _are_optimizers(states: Any) -> bool:
    return (
        bool(states)
        and _are_dicts(states, "state", "param_groups")
        and all(
            isinstance(state["state"], dict)
            and _are_dicts(list(state["state"].values()))
            and _are_dicts(state["param_groups"], "params")
            for state in states
        )
    )


# The entries that a resumed run needs: what each must be, and the check. Without some of them, Lightning would train
# from the first epoch on.
RESUMED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a whole number", lambda epoch: type(epoch) is int),
    "global_step": ("a whole number", lambda step: type(step) is int),
    "loops": ("the states of Lightning's loops", lambda loops: _completed_steps(loops) is not None),
    "callbacks": ("states by callback", lambda states: isinstance(states, dict)),
    "lr_schedulers": ("a list of states", _are_dicts),
    "optimizer_states": ("a list of states", _are_optimizers),
    "sgalign": ("a dict whose random_states are not empty", lambda ours: bool(ours["random_states"])),
    "pytorch-lightning_version": ("2.0 or newer", lambda text: bool(re.match(r"([2-9]|[1-9]\d+)\.\d", str(text)))),
}


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise InputError unless a checkpoint has the states that a resumed run needs.

    Args:
        checkpoint: a checkpoint that `check_ours` of `sgalign.training.checkpoints` has accepted.
    """
    if "optimizer_states" not in checkpoint:
        raise InputError(
            "ckpt_path must be a whole checkpoint of sgalign fit to resume a run, but it has no state of the "
            "optimizer. The folders of sgalign export have none"
        )
    for name, (form, fits) in RESUMED.items():
        if not fits(value := checkpoint.get(name)):
            raise InputError(
                f"ckpt_path must be a whole checkpoint of sgalign fit to resume a run, so its entry {name!r} must be "
                f"{form}, got {shown(value)}"
            )
    if (steps := _completed_steps(checkpoint["loops"])) != checkpoint["global_step"]:
        raise InputError(
            f"ckpt_path must be a whole checkpoint of sgalign fit to resume a run, but its global_step is "
            f"{checkpoint['global_step']}, and its loops are at step {steps}"
        )


def check_form(saved: Any, own: Any, name: str) -> None:
    """Raise InputError unless a state in a checkpoint has the form of the run's own state.

    Numbers must be finite, or equal to the run's own. They must not be negative if the run's own is not. Lists must
    have the same length. Dicts must have the same names. Names that begin with an underscore may be missing, because
    other versions of torch and Lightning lack them. If the run's own part is None, any value fits. If it is an empty
    list or dict, any list or dict fits.

    Args:
        saved: the state in the checkpoint.
        own: the state of the run before it loads the checkpoint.
        name: name of the state in the checkpoint, for the error.
    """
    if own is None:
        return
    if isinstance(own, Counter):  # how often the learning rate falls, by step
        form = "a dict of whole numbers"
        fits = isinstance(saved, dict) and all(map(_is_count, [*saved, *saved.values()]))
    elif isinstance(own, dict):
        needed = [key for key in own if not key.startswith("_")]
        form = f"a dict with {', '.join(needed)}" if needed else "a dict"
        fits = isinstance(saved, dict) and saved.keys() >= set(needed)
        for key in own if fits else ():
            if key in saved:
                check_form(saved[key], own[key], f"{name}.{key}")
    elif isinstance(own, list | tuple):
        form = f"a list of {len(own)} values" if own else "a list"
        fits = isinstance(saved, list | tuple) and len(own) in (0, len(saved))
        for place, value in enumerate(own if fits else ()):
            check_form(saved[place], value, f"{name}[{place}]")
    elif isinstance(own, Tensor):
        form = "a tensor of one number that is not NaN"
        is_number = isinstance(saved, Tensor) and saved.numel() == 1 and saved.is_floating_point()
        fits = is_number and not saved.isnan().any()
    elif type(own) is float:
        form = f"a number{' above or equal to 0' if own >= 0 else ''}"
        is_number = _is_whole(saved) or (type(saved) is float and (math.isfinite(saved) or saved == own))
        fits = is_number and not saved < 0 <= own
    elif type(own) is int:
        form, fits = "a whole number above or equal to 0", _is_count(saved)
    else:
        form, fits = f"of type {type(own).__name__}", type(saved) is type(own)
    if not fits:
        raise InputError(f"ckpt_path must have the states of this run, so {name} must be {form}, got {shown(saved)}")


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST_WHOLE


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def check_callbacks(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Raise InputError unless the states of Lightning's callbacks fit the trainer's callbacks.

    They must have the form of the callbacks' own states, and must name no file that Lightning could delete wrongly.

    Args:
        checkpoint: a checkpoint that `check_resumable` has accepted.
        trainer: the trainer of the run.
    """
    for callback in [*trainer.checkpoint_callbacks, *trainer.early_stopping_callbacks]:
        if (key := callback.state_key) not in checkpoint["callbacks"]:
            continue
        state = checkpoint["callbacks"][key]
        if type(callback) in (ModelCheckpoint, EarlyStopping):  # states of subclasses may have another form
            # The models do not count, because a trainer that has trained before has others.
            own = {name: {} if name == "best_k_models" else value for name, value in callback.state_dict().items()}
            check_form(state, own, key)
        if isinstance(callback, ModelCheckpoint):
            _check_models(state, callback)


def _check_models(state: Any, callback: ModelCheckpoint) -> None:
    """Raise InputError unless the models in a callback's state have scores and safe paths, and the worst is known."""
    check_form(state, {"best_k_models": {}}, callback.state_key)
    models = state["best_k_models"]
    scores = {f"score of {path}": score for path, score in models.items()}
    names = ("best_model_score", "current_score", "kth_value")
    scores |= {name: state[name] for name in names if state.get(name) is not None}
    for name, score in scores.items():
        check_form(score, torch.tensor(0.0), f"{callback.state_key}.{name}")
    paths = ("kth_best_model_path", "last_model_path", "best_model_path")
    for path in [*filter(None, (state.get(name) for name in paths)), *models]:
        if not isinstance(path, str) or not _is_safe(path, callback):
            raise InputError(
                f"ckpt_path must have paths of {callback.FILE_EXTENSION} files that do not leave {callback.dirpath} "
                f"by .. and are not on another machine, got {shown(path)}"
            )
    # Lightning compares the score of the next model with that of the worst one. In another folder, it forgets them.
    worst, same = state.get("kth_best_model_path"), state.get("dirpath", callback.dirpath) == callback.dirpath
    if same and 0 < callback.save_top_k <= len(models) and worst not in list(models):
        raise InputError(
            f"ckpt_path must have a kth_best_model_path that is one of its {len(models)} best_k_models, or save_top_k "
            f"of {callback.state_key} must be above {len(models)}, got {shown(worst)} and {callback.save_top_k}"
        )


def _is_safe(path: str, callback: ModelCheckpoint) -> bool:
    """Return True if Lightning cannot delete another file than a model of the callback's folder through this path.

    When a better model replaces this one, Lightning deletes it if it is in the folder or has an address such as
    `s3://`. It takes `folder/../other.ckpt` for a model of the folder.

    Args:
        path: the path of the model in the checkpoint.
        callback: the callback of the run that resumes.
    """
    folder = str(callback.dirpath)
    if "://" in path:
        inside, rest = path.startswith(f"{folder}/"), path.removeprefix(folder).split("/")
        return inside and ".." not in rest and path.endswith(callback.FILE_EXTENSION)
    whole, own = Path(path).absolute(), Path(folder).absolute()
    climbs = own in whole.parents and ".." in whole.relative_to(own).parts
    return not climbs and path.endswith(callback.FILE_EXTENSION)


def check_states(checkpoint: Mapping[str, Any], trainer: pl.Trainer) -> None:
    """Raise InputError unless the states of a checkpoint have the form of the run's own states.

    Args:
        checkpoint: a checkpoint that `check_resumable` has accepted.
        trainer: the trainer of the run, which has its optimizers and has not loaded the checkpoint's states.
    """
    rates = [
        [{name: group[name] for name in ("lr", "initial_lr") if name in group} for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]
    check_form(checkpoint["optimizer_states"], [{"param_groups": groups} for groups in rates], "optimizer_states")
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if len(schedules) != len(checkpoint["lr_schedulers"]):
        raise InputError(
            f"ckpt_path must have the states of {len(schedules)} learning rate schedules, got "
            f"{len(checkpoint['lr_schedulers'])}"
        )
    check_form(checkpoint["lr_schedulers"], schedules, "lr_schedulers")
    for saved, own in zip(checkpoint["lr_schedulers"], schedules, strict=True):
        for name in saved.keys() - own.keys():  # torch would put it in the place of a method
            rank_zero_info(f"{shown(name)} of a learning rate schedule in the checkpoint is not used")
            del saved[name]
    loop = checkpoint["loops"]["fit_loop"]
    check_form(loop, trainer.fit_loop.state_dict(), "fit_loop")
    check_form(loop["state_dict"].get("combined_loader", [{}]), [{}], "combined_loader")
    scaler = type(trainer.precision_plugin).__qualname__
    if scaler in checkpoint:
        check_form(checkpoint[scaler], trainer.precision_plugin.state_dict(), scaler)


def check_same_step(step: int, trainer: pl.Trainer) -> None:
    """Raise InputError in all processes unless all have loaded the checkpoint of the same step, or none has.

    Args:
        step: the step of this process's checkpoint, or -1 if it has loaded none.
        trainer: the trainer of a run of several processes.
    """
    own = torch.tensor(step, device=trainer.strategy.root_device)
    steps = [torch.zeros_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(steps, own)
    for rank, other in enumerate(steps):
        if other != steps[0]:
            first, second = ("none" if one < 0 else f"that of step {one}" for one in (steps[0], other))
            raise InputError(
                f"ckpt_path must be the same checkpoint in all processes, but process 0 has {first}, and process "
                f"{rank} has {second}: write the checkpoints to a folder that all machines share"
            )


ADAM = ("step", "exp_avg", "exp_avg_sq")
STATES: dict[type, tuple[str, ...]] = {  # what each optimizer keeps of a weight
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.SGD: ("momentum_buffer",),
}


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], step: int) -> None:
    """Raise InputError unless optimizers have loaded finite states of their weights. Copy states with other strides.

    torch does not compare shapes and strides. With wrong ones, its fused kernels read and write outside of the states.

    Args:
        optimizers: the optimizers, which have loaded the states of a checkpoint.
        step: the step of the checkpoint.
    """
    for optimizer in optimizers:
        if step and not optimizer.state:
            raise InputError(f"ckpt_path must have a state of the optimizer at step {step}, but has none")
        for weight, state in optimizer.state.items():
            if not isinstance(weight, Tensor):
                raise InputError(f"ckpt_path must have no states of other weights, got one of weight {weight!r}")
            for name in STATES.get(type(optimizer), ()):
                value, shape = state.get(name), torch.Size() if name == "step" else weight.shape
                if not isinstance(value, Tensor) or value.shape != shape or value.layout != torch.strided:
                    raise InputError(
                        f"ckpt_path must have, for each weight of shape {list(weight.shape)}, the optimizer's {name} "
                        f"of shape {list(shape)}, got {shown(value)}"
                    )
                if not value.isfinite().all():
                    raise InputError(f"ckpt_path must have finite states of the optimizer, but {name} is not finite")
                if shape and value.stride() != weight.stride():
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
