"""Functions that read image files of any mode as RGB images or tensors, and that write image files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from sgalign.data.scene_graph import SceneGraph
from sgalign.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


def image_size(path: Path) -> tuple[int, int]:
    """Return the width and height of an image file, before any EXIF rotation.

    Raises:
        ValueError: if the file is not an image. The error names the file.
    """
    with _open(path) as image:
        return image.size


def load_image(path: Path, *, upright: bool = False) -> Image.Image:
    """Return the image in a file as RGB. 16-bit grayscale values are scaled to 8 bits.

    Args:
        path: the file.
        upright: if True, rotate a photograph as its EXIF orientation says. Leave it False for data sets, because their
            boxes refer to the stored image.

    Raises:
        ValueError: if the file is not an image or is cut short. The error names the file.
    """
    from PIL import ImageOps

    with _open(path) as image:
        image.load()
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # Pillow's own conversion clips values at 255 instead of scaling them.
            image = image.point(lambda value: value * (1 / 256), "F").convert("L")
        return image.convert("RGB")


def read_pixels(graph: SceneGraph) -> Tensor:
    """Return the graph's image, float32 `[3, height, width]` with values from 0 to 1.

    Some image files of Visual Genome differ in size from their annotations. Such an image is resized to fit its boxes.

    Raises:
        ValueError: if the graph has no image, or the image cannot be read.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    if graph.image is None:
        raise InputError(
            f"image {graph.image_id!r}: must have an image file for a model that reads images, got only boxes"
        )
    image = graph.image()
    if image.size != (graph.width, graph.height):
        image = image.resize((graph.width, graph.height), Image.Resampling.BILINEAR)
    return pil_to_tensor(image.convert("RGB")).float() / 255


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: must be an image that can be read ({error}); replace or remove it") from error


def save_image(graph: SceneGraph, path: Path) -> None:
    """Save a graph's image, if it has one. The suffix of `path` determines the format."""
    if graph.image is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        graph.image().convert("RGB").save(path, quality=92)
