"""A self-contained HTML page that shows the scene graphs of images."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgalign.data.findings import counted
from sgalign.errors import InputError
from sgalign.files import written_whole
from sgalign.viewing.comparison import finders

if TYPE_CHECKING:
    from PIL import Image

MOST_IMAGES = 200  # images per page, which then has about 20 MB
LONG_SIDE = 800  # of an embedded photograph, in pixels
THUMBNAIL = 120  # long side in pixels
OTHER_OBJECTS = 100  # objects without a relation per graph


@dataclass(frozen=True)
class PageImage:
    """An image of a page, with its predicted graph, its annotated graph, or both.

    Attributes:
        image_id: name of the image.
        image: function that loads the image, or None if there is no image file. If it raises InputError or OSError, the
            page shows only the boxes and says so.
        width: width in pixels to which the boxes refer. If None, that of the loaded image.
        height: height in pixels, as `width`.
        predicted: the predictions, as `describe` returns them, or None.
        annotated: the annotations, as `describe_annotations` returns them, or None.
        triplets: number of predicted triplets, if `predicted` has only the best of them.
    """

    image_id: str
    image: Callable[[], Image.Image] | None = None
    width: int | None = None
    height: int | None = None
    predicted: dict[str, Any] | None = None
    annotated: dict[str, Any] | None = None
    triplets: int | None = None


@dataclass
class PageContent:
    """The content of a page that was written.

    `str` returns it as sentences.

    Attributes:
        images: number of images on the page.
        left_out: number of images beyond `MOST_IMAGES`.
        boxes_only: number of images on the page without a photograph.
        top_k: number of predicted triplets that an image has at most, or None if there is no limit.
        triplets_left_out: number of predicted triplets beyond `top_k`.
        compared: number of images with both graphs.
        annotated: number of annotated relations in these images.
        found: number of them that the predicted triplets on the page find.
    """

    images: int = 0
    left_out: int = 0
    boxes_only: int = 0
    top_k: int | None = None
    triplets_left_out: int = 0
    compared: int = 0
    annotated: int = 0
    found: int = 0

    def sentences(self) -> list[str]:
        """Return what a user should know about the page."""
        sentences = [f"{counted(self.images, 'image')}."]
        if self.left_out:
            sentences.append(f"Left out: {counted(self.left_out, 'image')}, because a page has at most {MOST_IMAGES}.")
        if self.boxes_only:
            sentences.append(
                f"Boxes only: {counted(self.boxes_only, 'image')}, because the image file is missing or cannot be read."
            )
        if self.triplets_left_out:
            sentences.append(
                f"Left out: {counted(self.triplets_left_out, 'triplet')}, because each image shows its "
                f"{self.top_k} best."
            )
        if self.compared:
            sentences.append(
                f"Annotated relations that the predictions on the page find: {self.found:,} of {self.annotated:,}."
            )
        return sentences

    def __str__(self) -> str:
        return " ".join(self.sentences())


def write_page(path: str | Path, images: Iterable[PageImage], title: str, *, top_k: int | None = None) -> PageContent:
    """Write a page that shows scene graphs. It is one HTML file that needs no other file and no network.

    Photographs are scaled to 800 pixels. The images are read one at a time. The page has the first 200 of them.

    Args:
        path: file to write. An existing file is replaced when the page is complete.
        images: the images of the page.
        title: heading of the page.
        top_k: number of predicted triplets per image, the first ones of each graph. If None, all of them.

    Returns:
        The numbers of images and relations on the page, and of those left out.

    Raises:
        ValueError: if `top_k` is less than 1.
        OSError: if the file cannot be written.
    """
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1 or None, got {top_k}")
    template = (resources.files("sgalign.viewing") / "page.html").read_text(encoding="utf-8")
    script = re.search("<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None
    # The browser runs only the script with this hash. So text in a file of predictions can never run.
    digest = base64.b64encode(sha256(script[1].encode()).digest()).decode()
    start, end = template.split("<!-- data -->\n")
    start = start.replace("SCRIPT_HASH", digest).replace("PAGE_TITLE", html.escape(title))
    content, overview, predicts = PageContent(top_k=top_k), [], False
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(start)
        for image in images:
            if content.images == MOST_IMAGES:
                content.left_out += 1
                continue
            entry, thumbnail = _entry(image, content)
            file.write(f'<script type="application/json" class="image">{_json(entry)}</script>\n')
            scores = [triplet["score"] for triplet in (entry["predicted"] or {"triplets": []})["triplets"]]
            overview.append({"id": image.image_id, "thumbnail": thumbnail, "top": max(scores, default=0)})
            predicts |= image.predicted is not None
        page = {
            "notes": content.sentences(),
            "images": overview,
            "predicts": predicts,
            "compares": content.compared > 0,
        }
        file.write(f'<script type="application/json" id="page">{_json(page)}</script>\n')
        file.write(end)
    return content


def _json(value: Any) -> str:
    """Return a value as JSON that cannot end the script element that contains it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _entry(image: PageImage, content: PageContent) -> tuple[dict[str, Any], str | None]:
    """Return the data of an image for the page and its thumbnail, and add the image to the content."""
    photograph, thumbnail, problem, size = None, None, "There is no image file for this image.", None
    if image.image is not None:
        try:
            loaded = image.image().convert("RGB")
            size = loaded.size
            photograph, thumbnail = _jpeg(loaded, LONG_SIDE), _jpeg(loaded, THUMBNAIL)
        except (InputError, OSError) as error:
            problem = f"The image file cannot be read: {error}"
    graphs = [graph for graph in (image.predicted, image.annotated) if graph is not None]
    if image.width is not None and image.height is not None:
        size = image.width, image.height
    if size is None:
        boxes = [item["box"] for graph in graphs for item in graph["objects"]]
        size = max((box[2] for box in boxes), default=1), max((box[3] for box in boxes), default=1)
    predicted = image.predicted
    if predicted is not None:
        total = len(predicted["triplets"]) if image.triplets is None else image.triplets
        predicted = predicted | {"triplets": predicted["triplets"][: content.top_k]}
        content.triplets_left_out += total - len(predicted["triplets"])
    entry: dict[str, Any] = {
        "photograph": photograph,
        "problem": None if photograph else problem,
        "size": [max(side, 1) for side in size],
        "predicted": predicted and _graph(predicted),
        "annotated": image.annotated and _graph(image.annotated),
    }
    if predicted is not None and image.annotated is not None:
        entry["finders"] = finders(predicted, image.annotated)
        content.compared += 1
        content.annotated += len(entry["finders"])
        content.found += sum(map(bool, entry["finders"]))
    content.images += 1
    content.boxes_only += photograph is None
    return entry, thumbnail


def _graph(graph: dict[str, Any]) -> dict[str, Any]:
    """Return a graph for the page. Of the objects without a relation, it has only the first ones."""
    related = {end for triplet in graph["triplets"] for end in (triplet["subject"], triplet["object"])}
    others = [index for index in range(len(graph["objects"])) if index not in related]
    objects = [
        {"index": index, "label": item["label"], "box": [round(side, 1) for side in item["box"]]}
        | ({"score": item["score"]} if "score" in item else {})
        for index in sorted(related | set(others[:OTHER_OBJECTS]))
        for item in [graph["objects"][index]]
    ]
    return {"objects": objects, "left_out": len(others[OTHER_OBJECTS:]), "triplets": graph["triplets"]}


def _jpeg(image: Image.Image, long_side: int) -> str:
    small = image.copy()
    small.thumbnail((long_side, long_side))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
