"""Region and union features of a data set, computed once and kept in HDF5 files."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sgalign.data import Objects, SceneGraph
from sgalign.data.features import FIELDS, FeatureCache, image_key
from sgalign.data.images import read_pixels
from sgalign.errors import InputError
from sgalign.files import hdf5_written_whole
from sgalign.models import Detector, RegionFeatures
from sgalign.training import MotifsModule, SceneGraphData, load_module
from sgalign.training.vision import ImageVision

IMAGES_A_FILE = 64


@torch.no_grad()
def cache_features(
    graphs: Sequence[SceneGraph], detector: Detector, regions: RegionFeatures, folder: str | Path, *, half: bool = False
) -> None:
    """Writes what `detector` and `regions` see of annotated boxes and of all ordered pairs of them.

    The files hold 64 images each and appear whole or not at all: a run that was interrupted goes on where it stopped,
    and images that are there already are not seen again. What is kept depends on all weights: those of `regions` are
    not trained any more where a model reads the files.

    Args:
        graphs: with images.
        folder: made if it is not there.
        half: stores float16, half the size.

    Raises:
        ValueError: an image cannot be read, or the folder has features of other weights or types.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {
        "weights": _digest(detector, regions),
        "dtype": "float16" if half else "float32",
        "sizes": f"{detector.model.transform.min_size}, {detector.model.transform.max_size}",
    }
    cache = FeatureCache(folder)
    known = len(cache.images)  # also checks the files
    for name, value in header.items():
        if cache.paths and cache.header.get(name) != value:
            raise InputError(
                f"{folder}: has features of {name} {cache.header.get(name)}, not {value}: choose another folder"
            )
    missing = [graph for graph in {graph.image_id: graph for graph in graphs}.values() if graph.image_id not in cache]
    following = int(cache.paths[-1].stem.removeprefix("features_")) + 1 if cache.paths else 0
    print(f"{folder}: {len(missing)} images to see, {known} are there", flush=True)
    detector, regions = detector.eval(), regions.eval()
    device = next(regions.parameters()).device
    for start in range(0, len(missing), IMAGES_A_FILE):
        path = folder / f"features_{following + start // IMAGES_A_FILE:05}.h5"
        with hdf5_written_whole(path) as file:
            file.attrs.update(header)
            for graph in missing[start : start + IMAGES_A_FILE]:
                group = file.create_group(image_key(graph.image_id))
                seen = _see(graph, detector, regions, device)
                for field, tensor in zip(FIELDS, seen, strict=True):
                    group[field] = tensor.half().numpy() if half and field != "boxes" else tensor.numpy()
        print(f"{path}: {min(start + IMAGES_A_FILE, len(missing))} of {len(missing)} images", flush=True)


def _see(graph: SceneGraph, detector: Detector, regions: RegionFeatures, device: torch.device) -> list[Tensor]:
    features = detector.features([read_pixels(graph).to(device)])
    boxes = [graph.boxes.to(device)]
    pairs = [Objects.of(torch.tensor([len(graph.boxes)])).pairs.to(device)]
    seen = regions.objects(features, boxes), detector.classify(features, boxes), regions.pairs(features, boxes, pairs)
    return [graph.boxes, *(value.cpu() for value in seen)]


def _digest(*modules: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    """`sgalign cache-features`."""
    parser = argparse.ArgumentParser("sgalign cache-features", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="of a model whose vision is 'images'")
    parser.add_argument("--data", metavar="FOLDER", help="a data set; without it, the generated scenes")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the files; a second run goes on")
    parser.add_argument("--parts", nargs="+", default=["train", "validation", "test"], metavar="PART")
    parser.add_argument("--validation-images", type=int, metavar="N", help="as for fit (default: the data set's)")
    parser.add_argument("--half", action="store_true", help="float16, half the size")
    options = parser.parse_args(arguments)
    module = load_module(options.checkpoint)
    if not isinstance(module, MotifsModule) or not isinstance(module.vision, ImageVision):
        raise InputError(f"{options.checkpoint}: must be of a model whose vision is 'images'")
    data = SceneGraphData(options.data, validation_images=options.validation_images)
    if unknown := set(options.parts) - {"train", "validation", "test"}:
        parser.error(f"--parts must be of train, validation and test, got {', '.join(sorted(unknown))}")
    graphs = [graph for part in options.parts for graph in getattr(data, part)]
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    cache_features(graphs, module.vision.detector, module.vision.regions, options.out, half=options.half)
    return 0
