"""Count the work and memory of the paper's experiments at the published sizes, and estimate their hours on an H100.

`python -m benchmarks.reproduction_cost` runs one training step and one evaluation of each stage on two generated images
on the CPU, with random weights. It needs 9 GiB of memory and takes up to half an hour. No number is a measured time.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode  # before sgalign, which then adds its formulas
from torchvision.ops import FrozenBatchNorm2d

from sgalign import training
from sgalign.data import GraphBatch, SceneGraph, collate
from sgalign.models.detector import ObjectDetections
from sgalign.models.entity_detector import EntityDetector

CLASSES, PREDICATES = 151, 51  # of VG150, with the background
# Xu et al. (CVPR 2017) count 11.5 objects and 6.2 relations per image. The spread is assumed.
OBJECTS, RELATIONS, DETECTIONS = (6, 17), (3, 9), 80
LANDSCAPE, PORTRAIT = (600, 900), (900, 600)  # height and width; a batch of both is padded to 900 x 900
TRAINED, DETECTOR_TRAINED = 57_723, 70_651  # training images with relations; 70 % of 108,073 images, less 5000
VALIDATED, TESTED = 5000, 26_446  # images

# Rates of one H100 (SXM), all assumed. By default, PyTorch uses TF32 for convolutions, but not for matrix products of
# float32. The data sheet has 67 TFLOP/s for float32, 495 for TF32, 989 for bfloat16, and 3.35 TB/s.
RATES = {  # TFLOP/s
    "float32": {"matrix": 45.0, "convolution": 150.0, "grouped": 25.0},  # 67, 30 and 5 % of the data sheet
    "bfloat16": {"matrix": 300.0, "convolution": 300.0, "grouped": 50.0},  # 30, 30 and 5 %
}
MEMORY = 2.0  # TB/s, 60 % of the data sheet; a copy on an H200 reached 58 %
OPERATOR = 12e-6  # seconds of the host per operator; the 3700 of SGTR's decoder took 42 ms on an H200
READ = 15e-3 / 4  # seconds per image with 4 worker processes; a core took 14 ms for a photograph of VRD


class Stage(NamedTuple):
    """A stage, with the images per step on all GPUs together and the training images per epoch."""

    name: str
    config: str
    options: dict[str, Any]
    images: int
    steps: int
    trained: int = TRAINED


FIGURES = "TFLOP per step | TFLOP per test image | million weights | trained | GiB"
MOTIFS = [(p, n) for p in ("PredCls", "SGCls", "SGDet") for n in ("Motifs", "Align-Motifs")]
STAGES = [
    Stage("Faster R-CNN", "faster_rcnn", {}, 8, 50_000, DETECTOR_TRAINED),
    *(Stage(f"{n}, {p}", n.lower().replace("-", "_"), {"protocol": p.lower()}, 12, 50_000) for p, n in MOTIFS),
    Stage("DETR", "detr", {}, 18, 150 * -(-DETECTOR_TRAINED // 18), DETECTOR_TRAINED),
    Stage("SGTR", "sgtr", {}, 24, 260_000),
    Stage("Align-SGTR", "align_sgtr", {}, 24, 260_000),
]


class Meter(TorchDispatchMode):
    """A mode that adds up operators, FLOPs and each operator's shortest time, and the memory of tensors but `there`."""

    def __init__(self, there: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in there)
        self.counter = FlopCounterMode(display=False)
        self.operators, self.flops, self.live, self.peak = 0, 0, 0, 0
        self.seconds = dict.fromkeys(RATES, 0.0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, name = self.counter.get_total_flops(), str(function)
        out = function(*args, **(kwargs or {}))
        self.operators += 1
        if function.is_view:
            return out
        flops, kind = self.counter.get_total_flops() - before, "matrix"
        if "convolution" in name:
            kind = "grouped" if args[-2 if "backward" in name else -1] > 1 else "convolution"
        if kind == "grouped" and "backward" in name:  # torch's formula for the gradient of the weight ignores groups
            flops = 2 * sum(args[-1][:2]) * args[0][:, 0].numel() * args[2].numel()
        self.flops += flops
        moved = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        for precision, width in (("float32", 1.0), ("bfloat16", 0.5)):
            self.seconds[precision] += 1e-12 * max(flops / RATES[precision][kind], width * moved / MEMORY)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return out

    def forget(self, size: int) -> None:
        self.live -= size


def generated(sizes: Sequence[tuple[int, int]]) -> GraphBatch:
    """Return a batch of images of these heights and widths, with random objects and relations."""
    graphs = []
    for (height, width), objects, relations in zip(sizes, OBJECTS, RELATIONS, strict=True):
        size = torch.tensor([width, height]).float()
        corner = torch.rand(objects, 2) * size * 0.6
        boxes = torch.cat([corner, corner + (0.1 + 0.3 * torch.rand(objects, 2)) * size], 1)
        pairs = torch.stack([torch.randperm(objects)[:2] for _ in range(relations)])
        predicates, labels = torch.randint(1, PREDICATES, (relations, 1)), torch.randint(1, CLASSES, (objects,))
        graphs.append(SceneGraph("", width, height, boxes, labels, torch.cat([pairs, predicates], 1)))
    return collate(graphs, PREDICATES - 1)._replace(pixels=[torch.rand(3, *size) for size in sizes])


def build(stage: Stage) -> Any:
    """Return the module of a stage with random weights. Parts are frozen as with trained weights."""
    model = yaml.safe_load(Path(f"configs/{stage.config}.yaml").read_text())["model"]
    kind, options = model["class_path"].rpartition(".")[2], model["init_args"] | stage.options
    if "short_sides" in options:
        options["short_sides"] = [540]  # the mean of the sides that training draws from
    module: Any = getattr(training, kind)(**options)
    if "short_sides" in options:
        module._detector_saved = {"config": EntityDetector(CLASSES - 1).config}  # as if trained weights were read
    module.make_network(torch.ones(CLASSES, CLASSES, PREDICATES))
    module.predicate_names = [str(number) for number in range(PREDICATES)]
    for name, layer in module.named_modules():  # without training, the features of deep networks would overflow
        if isinstance(layer, FrozenBatchNorm2d) and name.endswith("bn3"):
            layer.weight.mul_(0.1)
        elif name.endswith("input_projection"):
            layer.weight.data.mul_(1e-5)
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    return module


def crowded(batch: GraphBatch) -> list[ObjectDetections]:
    """Return the largest number of detections for each image, all near its annotated objects."""
    found = []
    for boxes, labels in zip(batch.boxes_by_image(), batch.labels.split(batch.lengths.tolist())):
        chosen = torch.arange(DETECTIONS) % len(boxes)
        near, scores = boxes[chosen] + torch.rand(DETECTIONS, 4), torch.rand(DETECTIONS, CLASSES)
        each = near[:, None].expand(-1, CLASSES, -1)
        found.append(ObjectDetections(near, labels[chosen], scores[:, 0], scores, each))
    return found


def row(stage: Stage, sizes: Sequence[tuple[int, int]]) -> str:
    """Return the row of a stage in the table."""
    torch.manual_seed(0)
    module, batch, count = build(stage), generated(sizes), len(sizes)
    if stage.options.get("protocol") == "sgdet":  # the random detector works as usual, but its detections are replaced
        detector, detect, detections = module.vision.detector, module.vision.detector.detect, crowded(batch)
        detector.detect = lambda features: detect(features) and detections
    learned = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in learned:
        weight.grad = torch.zeros_like(weight)
    trained, tested = Meter([*learned, *(weight.grad for weight in learned)]), Meter()
    with trained.counter, trained:
        module.train().training_step(batch, 0).backward()
    module.eval().requires_grad_(False)
    if hasattr(module.options, "short_sides"):
        module.options = replace(module.options, short_sides=[600])
    with tested.counter, tested:
        module.predictions(batch) if hasattr(module, "predictions") else module.detect(batch)

    epochs, share = stage.steps * stage.images // stage.trained, stage.images / count
    weights, numbers = (sum(p.numel() for p in part) for part in (module.parameters(), learned))
    states = 1 if getattr(module.options, "optimizer", "adam") == "sgd" else 2  # that the optimizer keeps per weight
    memory = 4 * (weights + (1 + states) * numbers) + share * trained.peak
    figures = [stage.images, stage.steps, epochs, f"{share * trained.flops / 1e12:.1f}"]
    figures += [f"{tested.flops / count / 1e12:.2f}", f"{weights / 1e6:.0f}", f"{numbers / 1e6:.0f}"]
    figures.append(f"{memory / 2**30:.0f}")
    for precision in RATES:
        step = max(share * trained.seconds[precision], OPERATOR * trained.operators, stage.images * READ)
        rest = (epochs * VALIDATED + TESTED) * max(tested.seconds[precision] / count, READ)
        figures += [f"{1e3 * step:.0f}", f"{(stage.steps * step + rest) / 3600:.1f}"]
    return f"| {stage.name} | {' | '.join(map(str, figures))} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.reproduction_cost", description=__doc__)
    parser.add_argument("--landscape", action="store_true", help="count images that need no padding")
    options = parser.parse_args()
    print("Estimates for one H100, counted and not measured. Hours include the validations and the test.\n")
    print(f"| stage | images | steps | epochs | {FIGURES} | {' | '.join(f'ms, {p} | hours' for p in RATES)} |")
    print(f"|{'---|' * 13}")
    for stage in STAGES:
        print(row(stage, [LANDSCAPE, LANDSCAPE if options.landscape else PORTRAIT]), flush=True)


if __name__ == "__main__":
    main()
