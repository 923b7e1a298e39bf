"""The prediction of scene graphs for many image files."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from sgalign.data import Detections, GraphBatch, SceneGraph, collate, collate_detected, load_image
from sgalign.data.workers import collate_and_share
from sgalign.errors import InputError
from sgalign.files import uninterrupted
from sgalign.prediction.image_paths import ImageFile
from sgalign.training import RelationModule


class FailedImage(NamedTuple):
    """An image without a result, and the reason."""

    file: ImageFile
    reason: str


class PredictedImage(NamedTuple):
    """The prediction for an image."""

    file: ImageFile
    width: int  # in pixels, after the EXIF rotation
    height: int
    prediction: dict[str, Any]  # as `RelationModule.predictions` returns it, with tensors on the module's device


def predict_images(
    module: RelationModule,
    files: Sequence[ImageFile],
    *,
    detections: Mapping[str, Detections] | None = None,
    batch_size: int = 1,
    workers: int = 0,
) -> Iterator[PredictedImage | FailedImage]:
    """Yield the result of each image file, in the order of `files`. In each batch, the failures come first.

    Only a few batches are in memory at a time. An image that cannot be read does not stop the others,
    nor does one that needs more memory than the GPU has.

    Args:
        module: trained model in evaluation mode, on the device that shall compute.
        files: image files, as `find_images` returns them.
        detections: objects of each image by image id. If None, the model finds the objects itself.
        batch_size: number of images that the model gets together. Smaller images of a batch are padded, which changes
            the results slightly.
        workers: number of processes that read images. With 0, this process reads them.
    """
    reader = _Reader(files, detections, len(module.predicate_names) - 1, pixels=module.looks_at_images)
    loader = DataLoader(
        reader,
        batch_size,
        num_workers=workers,
        collate_fn=partial(collate_and_share, reader.collate),
        worker_init_fn=_stay_silent,
        pin_memory=module.device.type == "cuda",
        generator=torch.Generator(),  # draws the workers' seeds instead of torch's global generator
    )
    for loaded in _ended_with_workers(loader):
        yield from loaded.failed
        if loaded.batch is None:
            continue
        batch = module.transfer_batch_to_device(loaded.batch, module.device, 0)
        try:
            with torch.no_grad():
                predictions = module.predictions(batch)
        except torch.OutOfMemoryError:
            what = "this image" if len(loaded.files) == 1 else f"this batch of {len(loaded.files)} images"
            reason = f"the GPU has too little free memory for {what}"
            yield from (FailedImage(file, f"{file.path}: {reason}") for file in loaded.files)
            continue
        sizes = loaded.batch.sizes.int().tolist()
        for file, (width, height), prediction in zip(loaded.files, sizes, predictions, strict=True):
            yield PredictedImage(file, width, height, prediction)


def _ended_with_workers(loader: DataLoader) -> Iterator[_Loaded]:
    """Yield the batches of a loader, and let its workers end if it raises an error."""
    try:
        yield from _start(loader)
    except Exception as error:
        # torch ends the workers when it deletes the loader's iterator, which the frames of a worker's error refer to.
        # Python would end them with SIGTERM, which they ignore, and wait for them forever.
        traceback.clear_frames(error.__traceback__)
        raise


def _start(loader: DataLoader) -> Iterator[_Loaded]:
    """Start the workers, and let Ctrl-C take effect afterwards. In a fork, Python may lose it, or a worker may end."""
    with uninterrupted():
        return iter(loader)


def _stay_silent(worker: int) -> None:
    """Let only the main process handle Ctrl-C and SIGTERM and print errors. It ends the workers."""
    sys.excepthook = lambda *error: None  # the main process gets an error from torch, and may end while one talks to it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Loaded(NamedTuple):
    """The images of a batch, read by a worker."""

    files: list[ImageFile]  # the images in the batch
    batch: GraphBatch | None  # None if no image could be read
    failed: list[FailedImage]


class _Reader(Dataset):
    """Scene graphs without relations for image files, and failures for images that cannot be read."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        detections: Mapping[str, Detections] | None,
        num_predicates: int,
        *,
        pixels: bool,
    ) -> None:
        self.files, self.detections = files, detections
        make = collate if detections is None else partial(collate_detected, detections=detections)
        self._make = partial(make, num_predicates=num_predicates, pixels=pixels)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[ImageFile, SceneGraph] | FailedImage:
        file = self.files[index]
        if self.detections is not None and file.image_id not in self.detections:
            return FailedImage(file, f"{file.path}: there is no image {file.image_id!r} in --detections")
        try:
            image = load_image(file.path)
        except InputError as error:
            return FailedImage(file, str(error))
        except Exception as error:  # plugins of Pillow raise many kinds of error, and the other images must go on
            return FailedImage(
                file, f"{file.path}: must be an image that can be read ({type(error).__name__}: {error})"
            )
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)
        return file, SceneGraph(file.image_id, *image.size, *nothing, lambda: image)

    def collate(self, items: Sequence[tuple[ImageFile, SceneGraph] | FailedImage]) -> _Loaded:
        """Return the batch of the images that could be read, and the failures."""
        failed = [item for item in items if isinstance(item, FailedImage)]
        read = [item for item in items if not isinstance(item, FailedImage)]
        batch = self._make([graph for _, graph in read]) if read else None
        return _Loaded([file for file, _ in read], batch, failed)
