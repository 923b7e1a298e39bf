"""Region and union features of a data set, computed once and kept in HDF5 files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import h5py
import torch
from torch import Tensor

from sgalign.data import GraphBatch, Objects, SceneGraph
from sgalign.data.batch import read_pixels
from sgalign.files import hdf5_written_whole

if TYPE_CHECKING:
    from sgalign.models import Detector, RegionFeatures

IMAGES_A_FILE = 64
FIELDS = ("boxes", "objects", "logits", "union")


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
            raise ValueError(
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
                group = file.create_group(_key(graph.image_id))
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


class FeatureCache:
    """Reads what `cache_features` wrote. Files are opened when they are first read, by each process for itself.

    Args:
        folder: of the files.

    Raises:
        ValueError: a file is cut short or of another program; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.paths = sorted(self.folder.glob("features_*.h5"))
        self._open: dict[tuple[int, Path], h5py.File] = {}  # by process: HDF5 handles do not survive a fork

    @cached_property
    def images(self) -> dict[str, Path]:
        where = {}
        for path in self.paths:
            try:
                with h5py.File(path, "r") as file:
                    where.update(dict.fromkeys(file, path))
                    if not {"weights", "dtype"} <= set(file.attrs):
                        raise OSError("no header")
            except OSError as error:
                raise ValueError(
                    f"{path}: not a file of features, or cut short ({error}): delete it, cache again"
                ) from error
        return where

    @property
    def header(self) -> dict[str, Any]:
        with h5py.File(self.paths[0], "r") as file:
            return dict(file.attrs)

    @property
    def source(self) -> str:
        """What tells these features from those that other weights, or the same ones at other sizes, see."""
        return f"{self.header['weights']} at {self.header.get('sizes')}"

    def __contains__(self, image_id: str) -> bool:
        return _key(image_id) in self.images

    def __getitem__(self, image_id: str) -> dict[str, Tensor]:
        """`boxes` `[N, 4]`, `objects` `[N, F]`, `logits` `[N, C]` and `union` `[N * (N - 1), F]`, all float32.

        Raises:
            ValueError: the image is not there.
        """
        if image_id not in self:
            raise ValueError(
                f"{self.folder}: has no features of image {image_id!r}: run sgalign cache-features for its data"
            )
        key = (os.getpid(), self.images[_key(image_id)])
        if key not in self._open:
            self._open[key] = h5py.File(key[1], "r")
        group = self._open[key][_key(image_id)]
        return {field: torch.from_numpy(group[field][()]).float() for field in FIELDS}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def add_to(self, batch: GraphBatch) -> GraphBatch:
        """The batch, which has all pairs of its images, with their features.

        Raises:
            ValueError: an image is not there, or its boxes are not those that were seen.
        """
        images = [self[image_id] for image_id in batch.image_ids]
        for image, boxes, image_id in zip(images, batch.boxes.split(batch.lengths.tolist()), batch.image_ids):
            if not torch.equal(image["boxes"], boxes):
                raise ValueError(f"{self.folder}: image {image_id!r} was seen with other boxes: cache its data again")
        objects, logits, union = (torch.cat([image[field] for image in images]) for field in FIELDS[1:])
        return batch._replace(object_features=objects, logits=logits, union_features=union)


def _key(image_id: str) -> str:
    return quote(image_id, safe="")


def _digest(*modules: torch.nn.Module) -> str:
    import hashlib

    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    """`sgalign cache-features`."""
    from sgalign.datamodule import SceneGraphData
    from sgalign.prediction import load_module
    from sgalign.training import MotifsModule

    parser = argparse.ArgumentParser("sgalign cache-features", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="of a model whose vision is 'images'")
    parser.add_argument("--data", metavar="FOLDER", help="a data set; without it, the generated scenes")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="for the files; a second run goes on")
    parser.add_argument("--parts", nargs="+", default=["train", "validation", "test"], metavar="PART")
    parser.add_argument("--validation-images", type=int, metavar="N", help="as for fit (default: the data set's)")
    parser.add_argument("--half", action="store_true", help="float16, half the size")
    options = parser.parse_args(arguments)
    module = load_module(options.checkpoint)
    if not isinstance(module, MotifsModule) or module.options.vision != "images":
        raise ValueError(f"{options.checkpoint}: must be of a model whose vision is 'images'")
    data = SceneGraphData(options.data, validation_images=options.validation_images)
    if unknown := set(options.parts) - {"train", "validation", "test"}:
        parser.error(f"--parts must be of train, validation and test, got {', '.join(sorted(unknown))}")
    graphs = [graph for part in options.parts for graph in getattr(data, part)]
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    cache_features(graphs, module.detector, module.regions, options.out, half=options.half)
    return 0
