"""Figure 1 of the supplement: what both branches of Align-SGTR attend to in a photograph, and the mirror's masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

from sgalign.data import load_image
from sgalign.errors import InputError
from sgalign.files import save_figure
from sgalign.models.entity_detector import resize
from sgalign.models.sgtr import MirrorMask
from sgalign.ops.random_mask import random_attention_mask
from sgalign.training import AlignSGTRModule, load_module

ROLES = ("predicate", "subject", "object")


@torch.no_grad()
def draw_mirror(checkpoint: str | Path, image: Path, out: Path, seed: int = 0) -> None:
    """The last layer's cross-attention of the query with the likeliest predicate, mean over heads.

    Three columns, predicate, subject and object; three rows, the supervised branch, the mirrored one, and the share of
    heads that see each position or entity through the mirror's mask. Predicates attend to positions of the image,
    subjects and objects to the detected entities, whose boxes are drawn the stronger the more they weigh.

    Args:
        checkpoint: of Align-SGTR.
        image: the photograph.
        out: the picture to write.
        seed: of the masks; their ratio is the one that the model was trained with.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or is not what it must be.
    """
    module = load_module(checkpoint)
    if not isinstance(module, AlignSGTRModule):
        raise InputError(f"{checkpoint}: must be a checkpoint of AlignSGTRModule, got {type(module).__name__}")
    photograph = load_image(image, upright=True)
    options = module.options
    pixels = resize(pil_to_tensor(photograph).float() / 255, options.short_sides[-1], options.long_side)
    entities = module.detector([pixels])
    network, mask = module.network, MirrorMask(options.mask_ratio, seed)
    call: dict[str, Any] = {}
    hook = network.cross_attention[-1].register_forward_pre_hook(
        lambda block, arguments, named: call.update(arguments=arguments, named=named), with_kwargs=True
    )
    outputs, _ = network.dual_branch(entities, (module.mirrored_predicate, module.mirrored_class), mask)
    hook.remove()
    likelihood = outputs.logits[-1, 0].sigmoid() if options.focal else outputs.logits[-1, 0].softmax(-1)[:, :-1]
    query, predicate = divmod(int(likelihood.argmax()), likelihood.shape[1])
    weights = network.cross_attention[-1].weights(*call["arguments"], **call["named"])  # type: ignore[operator]

    rows: list[list[Tensor]] = [[], [], []]  # supervised, mirrored, seen; of each role
    for number, (of_memory, roles) in enumerate(zip(weights, (1, 2), strict=True)):
        _, heads, queries, keys = of_memory[0].shape[1:]
        stream = call["named"]["stream"] + number
        seen = ~random_attention_mask(roles, heads, queries, keys, ratio=mask.ratio, seed=seed, stream=stream)
        for row, of_row in zip(rows, (of_memory[0][:, 0], of_memory[1][:, 0], seen.float()), strict=True):
            row.extend(of_row[:, :, query].mean(1))

    height, width = pixels.shape[1:]
    # Not the option: weights of another detector tell its stride.
    shapes = ((-(-height // stride), -(-width // stride)) for stride in (16, 32))
    shape = next(shape for shape in shapes if shape[0] * shape[1] == entities.memory.shape[1])
    boxes = box_convert(entities.boxes[-1, 0], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
    shown = pixels.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(13, 9), layout="constrained")
    for number, (axes_row, of_roles, name) in enumerate(
        zip(figure.subplots(3, 3), rows, ("supervised", "mirrored", "seen by the mirror, share of heads"), strict=True)
    ):
        for axes, role, strength in zip(axes_row, ROLES, of_roles, strict=True):
            axes.imshow(shown, alpha=0.6)
            axes.set_title(f"{role}: {name}", fontsize=9)
            axes.set_axis_off()
            if role == "predicate":
                heat = functional.interpolate(strength.view(1, 1, *shape), (height, width))[0, 0]
                axes.imshow(heat.numpy(), alpha=0.5, cmap="viridis", vmin=0, vmax=1 if number == 2 else None)
                continue
            for box, alpha in zip(boxes.tolist(), (strength / strength.max().clamp(min=1e-9)).tolist(), strict=True):
                x1, y1, x2, y2 = box
                frame = {"fill": False, "linewidth": 1.5, "edgecolor": "red", "alpha": alpha}
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **frame))
    figure.suptitle(f"{image.name}: {module.predicate_names[predicate + 1]} ({likelihood.max():.2f})")
    save_figure(figure, out)
    print(f"wrote {out}")
