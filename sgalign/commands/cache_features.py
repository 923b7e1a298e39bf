"""Compute the region and union features of a data set once, and store them in HDF5 files."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sgalign.commands.reading_options import add_reading_options, reading_options
from sgalign.data import Objects, SceneGraph
from sgalign.data.features import FIELDS, FeatureCache, image_key
from sgalign.data.findings import counted, warn
from sgalign.data.images import Size, describe_stretched, read_images
from sgalign.errors import InputError
from sgalign.files import folder_locked, hdf5_written_whole
from sgalign.models import Detector, RegionFeatures
from sgalign.training import MotifsModule, SceneGraphData, load_module
from sgalign.training.vision import ImageVision

IMAGES_A_FILE = 64


@torch.no_grad()
def cache_features(
    graphs: Sequence[SceneGraph], detector: Detector, regions: RegionFeatures, folder: str | Path, *, half: bool = False
) -> None:
    """Write the features of all annotated boxes and of all their ordered pairs to files.

    Each file holds up to 64 images. It appears only when it is complete. An interrupted run resumes where it stopped,
    because images that the folder already has are skipped. The features depend on the weights of `detector` and of
    `regions`. A model that reads the files can no longer train `regions`.

    Args:
        graphs: scene graphs with images.
        detector: detector whose feature maps and class scores are used.
        regions: extractors of the features of boxes and pairs.
        folder: folder for the files. It is made if it does not exist.
        half: if True, the features are stored as float16, which takes half the space.

    Raises:
        ValueError: if an image cannot be read, or if the folder has features of other weights, another dtype or
            another image size.
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
                f"{folder}: its features have {name} {cache.header.get(name)}, but the new ones would have {value}: "
                "choose another folder"
            )
    missing = [graph for graph in {graph.image_id: graph for graph in graphs}.values() if graph.image_id not in cache]
    following = int(cache.paths[-1].stem.removeprefix("features_")) + 1 if cache.paths else 0
    print(f"{folder}: {len(missing)} images to do, {known} already done", flush=True)
    detector, regions = detector.eval(), regions.eval()
    device = next(regions.parameters()).device
    stretched: dict[str, tuple[Size, Size]] = {}
    for start in range(0, len(missing), IMAGES_A_FILE):
        path = folder / f"features_{following + start // IMAGES_A_FILE:05}.h5"
        with hdf5_written_whole(path) as file:
            file.attrs.update(header)
            for graph in missing[start : start + IMAGES_A_FILE]:
                group = file.create_group(image_key(graph.image_id))
                (pixels,), new = read_images([graph])
                stretched |= new
                seen = _see(graph, pixels, detector, regions, device)
                for field, tensor in zip(FIELDS, seen, strict=True):
                    group[field] = tensor.half().numpy() if half and field != "boxes" else tensor.numpy()
        print(f"{path}: {min(start + IMAGES_A_FILE, len(missing))} of {len(missing)} images", flush=True)
    if stretched:
        number = counted(len(stretched), "image of other proportions than annotated")
        warn(f"{number}. For example, {describe_stretched(stretched)}")


def _see(
    graph: SceneGraph, pixels: Tensor, detector: Detector, regions: RegionFeatures, device: torch.device
) -> list[Tensor]:
    features = detector.features([pixels.to(device)])
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
    """Run `sgalign cache-features --checkpoint FILE --out FOLDER` and return the exit code."""
    parser = argparse.ArgumentParser("sgalign cache-features", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="checkpoint of a Motifs model with vision 'images'")
    parser.add_argument("--data", metavar="FOLDER", help="folder of a data set (default: generated scenes)")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="folder for the files; a repeated command adds the missing images",
    )
    splits = "splits of the data set (default: train validation test)"
    parser.add_argument("--splits", nargs="+", default=["train", "validation", "test"], metavar="SPLIT", help=splits)
    add_reading_options(parser)
    parser.add_argument("--half", action="store_true", help="store float16, which takes half the space")
    options = parser.parse_args(arguments)
    module = load_module(options.checkpoint)
    if not isinstance(module, MotifsModule) or not isinstance(module.vision, ImageVision):
        raise InputError(f"{options.checkpoint} must be the checkpoint of a Motifs model with vision 'images'")
    data = SceneGraphData(options.data, **reading_options(options))
    if unknown := set(options.splits) - {"train", "validation", "test"}:
        parser.error(f"--splits must be train, validation or test, got {', '.join(sorted(unknown))}")
    # `annotated` is the whole training split. Whether a model trains on all of it depends on its options.
    graphs = [graph for split in options.splits for graph in getattr(data, "annotated" if split == "train" else split)]
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with folder_locked(Path(options.out)):  # another process would choose the same names of files
        cache_features(graphs, module.vision.detector, module.vision.regions, options.out, half=options.half)
    return 0
