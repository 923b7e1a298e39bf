"""New runs that start from the weights of a model with other classes.

A class keeps its weights if the other model has a class of the same name. Its number may differ. All other classes
start anew.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sgalign.errors import InputError
from sgalign.files import read_tensors
from sgalign.models import Detector
from sgalign.training.base import SavedModule, module_named
from sgalign.training.checkpoints import check_names, not_finite, read_checkpoint, some_of
from sgalign.training.options import DetrOptions, Options, StartOptions
from sgalign.training.pretrained import is_pretrained
from sgalign.training.resuming import differing

Names = Mapping[str, Sequence[str]]  # the class names of each kind, with the background first
MIRRORS = {"tied_head", "tied_heads"}  # options that a new run may change, because only the mirror depends on them


def as_named(names: Sequence[str]) -> list[Hashable]:
    """Return the labels of rows in the order of the names, the background first."""
    return list(names)


def background_last(names: Sequence[str]) -> list[Hashable]:
    """Return the labels of rows in which the background comes last, as in DETR and SGTR."""
    return [*names[1:], names[0]]


def with_start(names: Sequence[str]) -> list[Hashable]:
    """Return the labels of rows with an additional last row, which marks the start of a sequence."""
    return [*names, ("start",)]


def four_each(names: Sequence[str]) -> list[Hashable]:
    """Return the labels of rows with four rows per class, one for each coordinate of a box."""
    return [(name, coordinate) for name in names for coordinate in range(4)]


class Rows(NamedTuple):
    """The rows of a layer that belong to classes."""

    kind: Literal["object", "predicate"]
    labels: Callable[[Sequence[str]], list[Hashable]] = as_named  # the label of each row, given the class names
    axis: int = 0  # dimension of the layer's tensors in which the rows lie

    def carry(self, name: str, own: Tensor, saved: Tensor, ours: Sequence[str], theirs: Sequence[str]) -> Tensor:
        """Return a copy of `own` with the rows of `saved` for all classes that both have.

        Args:
            name: the tensor's name, for errors.
            own, saved: tensors that have the same shape, apart from the number of rows.
            ours, theirs: the class names that belong to `own` and to `saved`, with the background first.

        Raises:
            ValueError: if the shapes differ otherwise, or `saved` does not have a row for each class.
        """
        mine, other = self.labels(ours)[: own.shape[self.axis]], self.labels(theirs)
        wanted = list(own.shape)
        # Only SGTR's predicates may lack a row, the last one for the background.
        wanted[self.axis] = len(other) - (own.shape[self.axis] < len(self.labels(ours)))
        if list(saved.shape) != wanted:
            raise InputError(f"{name} must have shape {wanted} to start from, but has shape {list(saved.shape)}")
        place = {label: row for row, label in enumerate(other)}
        pairs = [(row, place[label]) for row, label in enumerate(mine) if label in place]
        to, source = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        return own.clone().index_copy_(self.axis, to, saved.index_select(self.axis, source).to(own.dtype))


# The layers that depend on classes, by their names or a part of them. None means that a run computes the layer itself.
ClassRows = dict[str, Rows | None]
OF_FASTER_RCNN: ClassRows = {
    "box_predictor.cls_score": Rows("object"),
    "box_predictor.bbox_pred": Rows("object", four_each),
}
OF_DETR: ClassRows = {"class_labels_classifier": Rows("object", background_last)}
OF_MOTIFS: ClassRows = OF_FASTER_RCNN | {
    "object_embedding": Rows("object"),
    "edge_embedding": Rows("object"),
    "label_decoder.embedding": Rows("object", with_start),
    "label_decoder.out": Rows("object"),
    "network.predicate": Rows("predicate"),
    "mirrored_head": Rows("predicate"),
    "frequency_bias": None,
    "relation_loss": None,
}
OF_SGTR: ClassRows = OF_DETR | {
    "network.predicate": Rows("predicate", background_last),
    "mirrored_predicate": Rows("predicate", background_last),
    "entity_class": Rows("object", background_last, axis=1),
    "mirrored_class": Rows("object", background_last, axis=1),
    "entity_loss": None,
}


def layer_of(name: str, layers: ClassRows) -> str | None:
    """Return the key of `layers` that is a part of a tensor's dotted name, or None if there is none."""
    return next((layer for layer in layers if f".{layer}." in f".{name}"), None)


# ---- detectors


def carry_classes(
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    layers: ClassRows,
    ours: Sequence[str],
    theirs: Sequence[str] | None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Fit the class layers of a saved detector to the classes of another one.

    A saved detector without class names is assumed to have the same classes if their number is the same. Otherwise all
    classes start anew.

    Args:
        own: the state of the detector that is loaded.
        saved: the state of the saved detector.
        layers: the layers that depend on classes.
        ours: object classes of the detector that is loaded, the background first.
        theirs: object classes of the saved detector, or None if they are not known.

    Returns:
        The saved state in which class layers fit the detector that is loaded, and the names of the classes that it
        does not know.

    Raises:
        ValueError: if weights are not finite, or a class layer differs in another way than in its classes.
    """
    if names := not_finite(saved):
        raise InputError(f"detector weights must be finite, but these are not: {some_of(names)}")
    of_classes = [(name, layers[layer]) for name in own if name in saved and (layer := layer_of(name, layers))]
    if theirs is None:
        if all(own[name].shape == saved[name].shape for name, _ in of_classes):
            return dict(saved), []
        return dict(saved) | {name: own[name] for name, _ in of_classes}, list(ours[1:])
    state = dict(saved)
    for name, rows in of_classes if list(theirs) != list(ours) else []:
        # If a width differs, the tensor stays, and loading it raises an error that names the option.
        if rows is not None and saved[name].shape[1:] == own[name].shape[1:]:
            state[name] = rows.carry(name, own[name], saved[name], ours, theirs)
    return state, [name for name in ours if name not in theirs]


def load_detector(detector: Detector, source: str, object_names: Sequence[str]) -> list[str]:
    """Load the weights of Motifs' detector, and say which object classes start anew.

    Args:
        detector: the detector.
        source: as for `Detector.load_weights`, or a folder that `sgalign export` wrote, or the name of a model that
            comes with the package. Its classes may differ from the detector's.
        object_names: object classes of the detector, the background first.

    Returns:
        The names of the classes that start anew.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it has no weights of this detector.
    """
    own = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    if source == "torchvision":
        detector.load_weights(source)
        # The number of classes may be COCO's by chance, so no class of torchvision's weights is kept.
        detector.load_state_dict({name: own[name] for name in own if layer_of(name, OF_FASTER_RCNN)}, strict=False)
        new = list(object_names[1:])
    else:
        read = read_checkpoint(source) if is_pretrained(source) else read_tensors(source, "file of detector weights")
        saved, theirs = Detector.state_in(read, source), classes_in(read, source)
        try:
            state, new = carry_classes(own, saved, OF_FASTER_RCNN, object_names, theirs)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        detector.load_state(state, source)
        if theirs is None and not new:
            rank_zero_info(f"{source} has no class names, so they are taken to be the data's, in the same order")
    tell_new(source, new, len(object_names) - 1)
    return new


def classes_in(read: Any, source: str) -> list[str] | None:
    """Return the object classes of the content of a file, the background first, or None if it has none.

    Raises:
        ValueError: if they are not a list of different names.
    """
    saved = read.get("sgalign") if isinstance(read, dict) else None
    names = saved.get("object_names") if isinstance(saved, dict) else None
    if names is not None:
        check_names(source, "object_names", names)
    return names


def tell_new(source: str, new: Sequence[str], total: int) -> None:
    """Print which object classes of a detector start anew."""
    if new:
        rank_zero_info(
            f"the detector in {source} lacks {len(new)} of the data's {total} object classes, which start anew: "
            f"{some_of(new)}"
        )


def check_trained(option: str, source: str, new: Sequence[str], command: str) -> None:
    """Raise InputError if a frozen detector does not know classes of the data.

    Args:
        option: the option that names the detector.
        source: its value.
        new: the classes that the detector does not know.
        command: the options of `sgalign fit` that train a detector.
    """
    if new:
        raise InputError(
            f"{option} must be a detector of the data's object classes, because it stays frozen, but {source} lacks "
            f"{some_of(new)}. Train the detector first, with sgalign fit {command} {source} and the options of its "
            "sizes, and give its checkpoint as detector_weights"
        )


# ---- whole models


def read_start(module: SavedModule) -> dict[str, Any] | None:
    """Return the checkpoint that a new run starts from, or None if the options name none.

    Args:
        module: the module of the new run, which has no network yet.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it belongs to another system, or its options determine other layers.
    """
    if not isinstance(module.options, StartOptions) or module.options.start_from is None:
        return None
    source = module.options.start_from
    checkpoint = read_checkpoint(source)
    name, own = checkpoint["sgalign"]["module"], _first_with_layers(type(module))
    kind = module_named(name)
    if kind is None or not issubclass(kind, own):
        raise InputError(
            f"start_from must be a checkpoint of {own.__name__} or a variant of it, but {source} is of {name}"
        )
    if wrong := _other_network(module.options, checkpoint["hyper_parameters"]):
        raise InputError(f"{', and '.join(wrong)}, as in start_from ({source}), because they determine the layers")
    if names := not_finite(checkpoint["state_dict"]):
        raise InputError(f"start_from must have finite weights, but in {source} these are not finite: {some_of(names)}")
    return checkpoint


def _first_with_layers(kind: type) -> type:
    """Return the first class of a system. All variants of the system are subclasses of it."""
    return next(base for base in reversed(kind.__mro__) if "class_rows" in vars(base))


def _other_network(options: Options, saved: Mapping[str, Any]) -> list[str]:
    given = dataclasses.asdict(options)
    determine = {name: given[name] for name, kind in options.fixed.items() if kind == "network" and name not in MIRRORS}
    return [f"{name} must be {other!r}, got {own!r}" for name, (own, other) in differing(determine, saved).items()]


def start(module: SavedModule, checkpoint: Mapping[str, Any], source: str, layers: ClassRows) -> None:
    """Load the weights of another model into a new one, and say what is kept, what starts anew and what is left out.

    Word vectors and detector weights are loaded before. Word vectors remain for classes that the other model lacks, and
    a detector of its own replaces the other model's detector.

    Args:
        module: the new module. It has its network.
        checkpoint: result of `read_start`.
        source: name of the checkpoint, for messages.
        layers: the layers that depend on classes.

    Raises:
        ValueError: if a tensor has another shape for another reason than its classes, or if a frozen detector does not
            know all classes.
    """
    ours: Names = {"object": module.object_names, "predicate": module.predicate_names}
    theirs: Names = {kind: checkpoint["sgalign"][f"{kind}_names"] for kind in ours}
    saved = checkpoint["state_dict"]
    if not any(name in saved for name in module.state_dict()):
        raise InputError(f"start_from must have weights of the model, but {source} has none of its tensors")
    found: dict[str, list[str]] = defaultdict(list)
    for name, own in _unshared(module):
        layer = layer_of(name, layers)
        rows = None if layer is None else layers[layer]
        if _is_detector(name) and module.options.detector_weights is not None:  # type: ignore[attr-defined]
            found["from detector_weights"].append(name)
        elif layer is not None and rows is None:
            found["computed by the run"].append(name)
        elif name not in saved:
            found["new"].append(name)
        elif rows is not None and ours[rows.kind] != list(theirs[rows.kind]):
            own.copy_(rows.carry(f"{source}: {name}", own, saved[name], ours[rows.kind], theirs[rows.kind]))
            found["kept for classes of the same name"].append(name)
        elif own.shape != saved[name].shape:
            shapes = f"{list(own.shape)}, but it has shape {list(saved[name].shape)} in {source}"
            raise InputError(f"{name} must have shape {shapes}: give the options of the checkpoint, such as all sizes")
        else:
            own.copy_(saved[name])
            found["kept"].append(name)
    _check_detector(module, source, theirs["object"])
    left = [name for name in saved if name not in module.state_dict()]
    _tell(source, found, left, ours, theirs)


def _unshared(module: SavedModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module by name. A tensor with two names, such as a tied head, comes only once."""
    seen = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            yield name, tensor
        seen.add(tensor.data_ptr())


def _is_detector(name: str) -> bool:
    return name.startswith(("detector.", "vision.detector."))


def _check_detector(module: SavedModule, source: str, theirs: Sequence[str]) -> None:
    """Raise InputError if the checkpoint's detector stays frozen and does not know all classes of the data.

    Under PredCls, Motifs uses only the backbone of its detector.
    """
    options, new = module.options, [name for name in module.object_names if name not in theirs]
    if getattr(options, "detector_weights", None) is not None:
        return
    if isinstance(options, DetrOptions):
        if "detector" in options.frozen:
            check_trained("start_from", source, new, "--config configs/detr_small.yaml --model.detector_weights")
    elif module.protocol != "predcls" and any(_is_detector(name) for name, _ in module.named_parameters()):
        check_trained("start_from", source, new, "--config configs/faster_rcnn.yaml --model.weights")


def _tell(source: str, found: Mapping[str, list[str]], left: Sequence[str], ours: Names, theirs: Names) -> None:
    """Print what a new model has from another one, in one line for tensors and one for classes."""
    counts = []
    for what, tensors in {**found, **({"not used": left} if left else {})}.items():
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
        counts.append(f"{what}: {len(tensors)}" + ("" if what == "kept" else f" ({some_of(layers)})"))
    rank_zero_info(f"start_from {source}: tensors {', '.join(counts)}")
    parts = []
    for kind, plural in (("object", "object classes"), ("predicate", "predicates")):
        for what, known, names in (
            (f"new {plural}", theirs[kind], ours[kind]),
            (f"{plural} that are not used", ours[kind], theirs[kind]),
        ):
            if only := [name for name in names if name not in known]:
                parts.append(f"{what}: {len(only)} of {len(names) - 1} ({some_of(only)})")
    rank_zero_info(f"start_from {source}: {', '.join(parts) or 'the classes have the same names'}")
