"""Figure 1 of the supplement: the attention of both branches of Align-SGTR, and the masks of the mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from sgalign.errors import InputError
from sgalign.files import save_figure
from sgalign.models.entity_detector import resize
from sgalign.models.sgtr import MirrorMask
from sgalign.ops.random_mask import random_attention_mask
from sgalign.training import AlignSGTRModule, load_module

ROLES = ("predicate", "subject", "object")


class _Mirror(NamedTuple):
    """The attention of one query in the last layer, for both branches, in one photograph."""

    predicate: int  # class of the predicate, from 0
    likelihood: float  # probability of the predicate
    supervised: list[Tensor]  # one tensor per role: weight of each position or entity, averaged over heads
    mirrored: list[Tensor]  # the same for the mirrored branch
    seen: list[Tensor]  # one tensor per role: share of heads in which the mask keeps each position or entity
    boxes: Tensor  # [N, 4] boxes of the entities, corners in pixels


@torch.no_grad()
def draw_mirror(checkpoint: str | Path, image: Image, name: str, out: Path, seed: int = 0) -> None:
    """Draw the last layer's cross-attention for the query with the most probable predicate, averaged over heads.

    The columns are predicate, subject and object. The rows are the supervised branch, the mirrored branch, and the
    share of heads in which the mirror's mask keeps each position or entity. Predicates attend to positions of the
    image. Subjects and objects attend to the detected entities, and boxes with a higher weight are drawn more opaque.

    Args:
        checkpoint: file of an Align-SGTR checkpoint.
        image: the photograph.
        name: its name, for the title.
        out: file of the picture to write.
        seed: seed of the masks. The mask ratio is the one that the model was trained with.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the checkpoint is not one of Align-SGTR, or if a file cannot be read.
    """
    module = load_module(checkpoint)
    if not isinstance(module, AlignSGTRModule):
        raise InputError(f"{checkpoint} must be a checkpoint of AlignSGTRModule, got {type(module).__name__}")
    options = module.options
    photograph = pil_to_tensor(image).float() / 255
    pixels = resize(photograph, options.short_sides[-1], options.long_side)
    mirror = _look(module, pixels, seed)
    figure = Figure(figsize=(13, 9), layout="constrained")
    rows = {
        "supervised": mirror.supervised,
        "mirrored": mirror.mirrored,
        "kept by the mirror's mask, share of heads": mirror.seen,
    }
    for axes_row, (branch, of_roles) in zip(figure.subplots(3, 3), rows.items(), strict=True):
        for axes, role, strength in zip(axes_row, ROLES, of_roles, strict=True):
            axes.imshow(pixels.permute(1, 2, 0).numpy(), alpha=0.6)
            axes.set_title(f"{role}: {branch}", fontsize=9)
            axes.set_axis_off()
            if role == "predicate":
                _draw_heat(axes, strength, pixels, top=1 if of_roles is mirror.seen else None)
            else:
                _draw_boxes(axes, strength, mirror.boxes)
    figure.suptitle(f"{name}: {module.predicate_names[mirror.predicate + 1]} ({mirror.likelihood:.2f})")
    save_figure(figure, out)
    print(f"wrote {out}")


def _look(module: AlignSGTRModule, pixels: Tensor, seed: int) -> _Mirror:
    """Return the attention of both branches in an image `[3, height, width]`."""
    network, mask = module.network, MirrorMask(module.options.mask_ratio, seed)
    entities = module.detector([pixels])
    last = network.cross_attention[-1]
    call: dict[str, Any] = {}
    hook = last.register_forward_pre_hook(
        lambda block, arguments, named: call.update(arguments=arguments, named=named), with_kwargs=True
    )
    outputs, _ = network.dual_branch(entities, (module.mirrored_predicate, module.mirrored_class), mask)
    hook.remove()
    logits = outputs.logits[-1, 0]
    likelihood = logits.sigmoid() if module.options.focal else logits.softmax(-1)[:, :-1]
    query, predicate = divmod(int(likelihood.argmax()), likelihood.shape[1])

    supervised: list[Tensor] = []
    mirrored: list[Tensor] = []
    seen: list[Tensor] = []
    weights = last.weights(*call["arguments"], **call["named"])  # type: ignore[operator]
    for number, (of_memory, roles) in enumerate(zip(weights, (1, 2), strict=True)):
        _, heads, queries, keys = of_memory[0].shape[1:]
        stream = call["named"]["stream"] + number
        dropped = random_attention_mask(roles, heads, queries, keys, ratio=mask.ratio, seed=seed, stream=stream)
        supervised += of_memory[0][:, 0, :, query].mean(1)
        mirrored += of_memory[1][:, 0, :, query].mean(1)
        seen += (~dropped).float()[:, :, query].mean(1)
    height, width = pixels.shape[1:]
    boxes = box_convert(entities.boxes[-1, 0], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
    return _Mirror(predicate, likelihood.max().item(), supervised, mirrored, seen, boxes)


def _draw_heat(axes: Axes, strength: Tensor, pixels: Tensor, top: float | None) -> None:
    """Draw the weight of each position of the image's memory.

    Args:
        axes: axes to draw on.
        strength: weight of each position, `[positions]`.
        pixels: image, `[3, height, width]`.
        top: weight of the brightest color. If None, the largest weight.
    """
    height, width = pixels.shape[1:]
    # Find the stride from the number of positions. `options.stride` may be wrong, because loaded detector weights have
    # their own stride.
    shapes = ((-(-height // stride), -(-width // stride)) for stride in (16, 32))
    shape = next(shape for shape in shapes if shape[0] * shape[1] == len(strength))
    heat = functional.interpolate(strength.view(1, 1, *shape), (height, width))[0, 0]
    axes.imshow(heat.numpy(), alpha=0.5, cmap="viridis", vmin=0, vmax=top)


def _draw_boxes(axes: Axes, strength: Tensor, boxes: Tensor) -> None:
    """Draw the boxes of the entities. The one with the highest weight is opaque."""
    alphas = strength / strength.max().clamp(min=1e-9)
    for (x1, y1, x2, y2), alpha in zip(boxes.tolist(), alphas.tolist(), strict=True):
        frame = {"fill": False, "linewidth": 1.5, "edgecolor": "red", "alpha": alpha}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **frame))
