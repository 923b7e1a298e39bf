"""Functions that read image files of any mode as RGB images or tensors, and that write image files."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sgalign.data.box_checks import LARGEST
from sgalign.data.scene_graph import SceneGraph
from sgalign.errors import InputError, is_lack_of_memory, packages_of, shown
from sgalign.numbers import whole_number

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # width and height in pixels

# Pillow recognizes these formats, but it cannot read them without other programs.
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
EXIF_ORIENTATION = 0x0112
# Pillow's name of the operation that turns a photograph upright, for each EXIF orientation except 1 (upright).
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of image files that can be read, in lower case and with the dot."""
    from PIL import Image

    formats = {*_formats(), "MPO"}  # Pillow reads MPO files as JPEG
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


@cache
def writable_suffixes() -> frozenset[str]:
    """Return the suffixes of image files that can be read and written."""
    from PIL import Image

    formats = Image.registered_extensions()
    return frozenset(suffix for suffix in image_suffixes() if formats[suffix] in Image.SAVE)


def is_image(path: Path) -> bool:
    """Return True if a file has the suffix of an image, or has no suffix but begins like an image."""
    if path.suffix:
        return path.suffix.lower() in image_suffixes()
    try:
        with _open(path):
            return True
    except InputError:
        return False


def parse_size(where: str, row: Mapping[str, Any]) -> Size:
    """Return the width and height of an image from its entry in a JSON file.

    Raises:
        ValueError: if `width` or `height` is not a whole number from 1 to `LARGEST`.
    """
    width, height = (whole_number(row.get(side)) for side in ("width", "height"))
    if width is None or height is None or not 1 <= min(width, height) <= max(width, height) <= LARGEST:
        got = f"{shown(row.get('width'))} and {shown(row.get('height'))}"
        raise InputError(f"{where}: width and height must be whole numbers from 1 to {LARGEST}, got {got}")
    return width, height


def check_file_name(where: str, name: Any) -> None:
    """Raise InputError unless a name is a path in the data set's folder."""
    path = Path(name) if isinstance(name, str) else Path()
    if not path.name or "\0" in name or ".." in path.parts or path.is_absolute():
        raise InputError(f"{where} must be a path in the data set's folder, got {shown(name)}")


def image_size(path: Path) -> Size:
    """Return the width and height of an image file, before any EXIF rotation.

    Raises:
        ValueError: if the file is not an image. The error names the file.
    """
    with _open(path) as image:
        return image.size


def image_sizes(path: Path) -> tuple[Size, Size]:
    """Return the size of an image file as it is stored, and its size after the EXIF rotation.

    Pillow always rotates TIFF files, so both sizes are those after the rotation.

    Raises:
        ValueError: if the file is not an image. The error names the file.
    """
    with _open(path) as image:
        return _sizes(image.size, _orientation(image))


def same_proportions(a: Size, b: Size) -> bool:
    """Return True if two sizes have the same proportions, up to the rounding of their widths and heights."""
    return abs(a[0] * b[1] - b[0] * a[1]) <= sum(a) + sum(b)


def load_image(path: Path, size: Size | None = None) -> Image.Image:
    """Return the image in a file as RGB. The first frame of an animation is the image.

    Pixels of 16 or 32 bits are scaled to 8 bits, such that the image's lowest value becomes 0 and its highest 255.
    Transparency is ignored.

    Args:
        path: the file.
        size: width and height that the annotations of the image give. A photograph is rotated as its EXIF orientation
            says if only the rotated size equals `size`, or if neither does and only the rotated one has the proportions
            of `size`. If None, there are no annotations, and the photograph is always rotated.

    Raises:
        ValueError: if the file is not an image or is cut short. The error names the file.
    """
    from PIL import Image

    with _open(path) as image:
        image.load()
        orientation = _orientation(image)
        stored, turned = _sizes(image.size, orientation)
        if orientation in TURNS and (size is None or _fit(turned, size) > _fit(stored, size)):
            image = image.transpose(Image.Transpose[TURNS[orientation]])
        if image.mode[0] in "IF":
            # Pillow's own conversion clips values at 255 instead of scaling them.
            image = Image.fromarray(_to_8_bits(np.asarray(image, dtype=np.float64)))
        image.info = {}  # an EXIF orientation that no longer holds, and transparency
        return image.convert("RGB")


def read_images(graphs: Sequence[SceneGraph]) -> tuple[list[Tensor], dict[str, tuple[Size, Size]]]:
    """Return the images of scene graphs, and the sizes of those that were stretched.

    Some image files of Visual Genome differ in size from their annotations. Such an image is resized to fit its boxes.
    If its proportions also differ, resizing stretches it, and its boxes may not fit.

    Returns:
        The images, float32 `[3, height, width]` with values from 0 to 1. For the id of each stretched image, the size
        of its file and the size in its annotations.

    Raises:
        ValueError: if a graph has no image, or the image cannot be read.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    pixels, stretched = [], {}
    for graph in graphs:
        if graph.image is None:
            raise InputError(
                f"image {graph.image_id!r}: must have an image file for a model that reads images, got only boxes"
            )
        image, size = graph.image(), (graph.width, graph.height)
        if not same_proportions(image.size, size):
            stretched[graph.image_id] = image.size, size
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels.append(pil_to_tensor(image.convert("RGB")).float() / 255)
    return pixels, stretched


def describe_stretched(stretched: Mapping[str, tuple[Size, Size]]) -> str:
    """Return a message about the first of the stretched images that `read_images` returned."""
    name, ((width, height), (annotated_width, annotated_height)) = next(iter(stretched.items()))
    return (
        f"image {name!r} is stretched, so its boxes may not fit. Its file has {width} x {height} pixels, but its "
        f"annotations {annotated_width} x {annotated_height}. `sgalign check FOLDER` counts such images."
    )


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in Image.OPEN if name not in UNREADABLE]


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 to 8. Without a valid one, return 1."""
    if image.format == "TIFF":  # Pillow rotates TIFF files itself
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken EXIF data raise errors of many types
        return 1
    return orientation if orientation in TURNS else 1


def _sizes(stored: Size, orientation: int) -> tuple[Size, Size]:
    return stored, stored[::-1] if orientation >= 5 else stored


def _fit(size: Size, wanted: Size) -> tuple[bool, bool]:
    return size == wanted, same_proportions(size, wanted)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Return the values, scaled such that the lowest finite one is 0 and the highest 255. NaN becomes 0."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    from PIL import Image

    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")  # opening a pipe would wait for its other end
        with Image.open(path, formats=_formats()) as image:
            image.filename = ""  # so Pillow does not map the file into memory, which garbles rotated TIFF files
            yield image
    except Exception as error:  # plugins of Pillow raise many kinds of error for damaged files
        if is_lack_of_memory(error) or not (isinstance(error, OSError) or "PIL" in packages_of(error)):
            raise
        raise InputError(f"{path}: must be an image that can be read ({error}); replace or remove it") from error


def save_image(graph: SceneGraph, path: Path) -> None:
    """Save a graph's image, if it has one. The suffix of `path` determines the format."""
    if graph.image is not None:
        from PIL import Image

        # Pillow does not notice a full disk that takes only a part of the last bytes (Pillow 13), but Python does.
        content = io.BytesIO()
        graph.image().convert("RGB").save(content, Image.registered_extensions().get(path.suffix.lower()), quality=92)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getbuffer())
