"""Tests of reading image files, and of the images in a batch."""

import dataclasses
import resource
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
from PIL import Image  # noqa: E402
from trainers import SMALL_MOTIFS, scenes, trainer_without_sanity_check  # noqa: E402

from sgalign.data import SceneGraph, collate  # noqa: E402
from sgalign.data.images import (  # noqa: E402
    image_size,
    image_sizes,
    image_suffixes,
    load_image,
    read_images,
    same_proportions,
    save_image,
)
from sgalign.prediction import find_images  # noqa: E402
from sgalign.training import MotifsModule, SceneGraphData, datamodule  # noqa: E402

# A photograph of 40 x 30 pixels in upright position, of 12 gray squares.
UPRIGHT = np.kron(np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4), np.ones((10, 10), np.uint8))
# The same photograph as a camera stores it, by the definition of each EXIF orientation.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT[:, ::-1].T,  # the first row is the right side of the photograph, from top to bottom
    7: UPRIGHT[::-1, ::-1].T,
    8: UPRIGHT[::-1].T,  # the first row is the left side of the photograph, from bottom to top
}


def save(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(path, exif=exif, lossless=True)
    return path


def gray(path, *size):
    """Return the loaded pixels, which must be gray, uint8 `[H, W]`."""
    pixels = np.asarray(load_image(path, *size))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def graph_of(image, width, height, boxes=()):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.ones(len(boxes), dtype=torch.int64)
    return SceneGraph("x", width, height, boxes, labels, torch.zeros(0, 3, dtype=torch.int64), image)


# ---- orientation


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_photograph_without_annotations_is_turned_upright(orientation, suffix, tmp_path):
    path = save(tmp_path / f"x{suffix}", orientation)
    np.testing.assert_array_equal(gray(path), UPRIGHT)
    stored = STORED[orientation].shape[::-1]
    assert image_size(path) == stored and image_sizes(path) == (stored, (40, 30))
    assert load_image(path).getexif().get(0x0112, 1) == 1  # so no one turns it again


@pytest.mark.parametrize(
    "size, turned",
    [((30, 40), False), ((40, 30), True), ((15, 20), False), ((81, 60), True), ((50, 50), False)],
    ids=["stored", "turned", "stored, smaller", "turned, larger", "neither"],
)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_annotated_photograph_is_turned_if_only_then_it_fits(orientation, size, turned, tmp_path):
    path = save(tmp_path / "x.png", orientation)
    np.testing.assert_array_equal(gray(path, size), UPRIGHT if turned else STORED[orientation])


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_an_annotated_photograph_that_fits_as_stored_is_not_turned(orientation, tmp_path):
    path = save(tmp_path / "x.png", orientation)
    np.testing.assert_array_equal(gray(path, (40, 30)), STORED[orientation])


def test_the_exact_size_decides_if_the_photograph_is_nearly_square(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (100, 101)).save(tmp_path / "x.png", exif=exif)
    for size in ((100, 101), (101, 100)):
        assert load_image(tmp_path / "x.png", size).size == size


def test_boxes_of_a_turned_photograph_lie_on_their_objects(tmp_path):
    path = save(tmp_path / "x.png", 6)
    graph = graph_of(partial(load_image, path, (40, 30)), 40, 30, [[30, 0, 40, 10], [0, 20, 10, 30]])
    batch = collate([graph], 1, pixels=True)
    for (x1, y1, x2, y2), value in zip(graph.boxes.int().tolist(), (UPRIGHT[0, -1], UPRIGHT[-1, 0]), strict=True):
        assert (batch.pixels[0][:, y1:y2, x1:x2] * 255).round().unique().tolist() == [value]
    assert batch.stretched == {}


def test_proportions_are_the_same_up_to_rounding():
    assert same_proportions((1024, 683), (500, 333)) and same_proportions((500, 334), (1024, 683))
    assert not same_proportions((500, 338), (1024, 683)) and not same_proportions((160, 120), (120, 160))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0broken", b"Exif\0\0II*\0\xff\0\0\0", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\1"]
)
@pytest.mark.filterwarnings("error")
def test_broken_exif_data_are_ignored(exif, tmp_path):
    Image.fromarray(UPRIGHT).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(gray(tmp_path / "x.png"), UPRIGHT)
    assert image_sizes(tmp_path / "x.png") == ((40, 30), (40, 30))


@pytest.mark.parametrize("orientation", STORED)
def test_a_tiff_file_is_always_turned_upright(orientation, tmp_path):
    path = save(tmp_path / "x.tif", orientation)
    for size in ((), ((40, 30),), ((30, 40),)):
        np.testing.assert_array_equal(gray(path, *size), UPRIGHT)
    assert image_sizes(path) == ((40, 30), (40, 30))


# ---- modes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, mode",
    [("x.png", "L"), ("x.png", "RGB"), ("x.png", "RGBA"), ("x.png", "LA"), ("x.png", "P"), ("x.tif", "CMYK")],
)
def test_images_of_8_bits_keep_their_values(name, mode, tmp_path):
    image = Image.fromarray(UPRIGHT)
    (image.convert("RGB") if mode == "CMYK" else image).convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.mode == mode
    np.testing.assert_array_equal(gray(tmp_path / name), UPRIGHT)


@pytest.mark.filterwarnings("error")
def test_transparency_is_ignored(tmp_path):
    image = Image.fromarray(UPRIGHT)
    image.convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    image.save(tmp_path / "color.png", transparency=int(UPRIGHT[0, 0]))
    image.convert("RGB").save(tmp_path / "alpha.png")
    transparent = image.convert("RGBA")
    transparent.putalpha(0)
    transparent.save(tmp_path / "alpha.png")
    for name in ("palette.png", "color.png", "alpha.png"):
        np.testing.assert_array_equal(gray(tmp_path / name), UPRIGHT)


def test_black_and_white_and_the_first_frame_of_an_animation_are_read(tmp_path):
    Image.fromarray(UPRIGHT > 100).save(tmp_path / "x.png")
    np.testing.assert_array_equal(gray(tmp_path / "x.png"), np.where(UPRIGHT > 100, 255, 0))
    frames = [Image.fromarray(frame) for frame in (UPRIGHT, UPRIGHT[::-1].copy())]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(gray(tmp_path / "x.gif"), UPRIGHT)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name, dtype, low, high",
    [
        ("x.png", "uint16", 0, 65535),
        ("x.png", "uint16", 1000, 3000),
        ("x.tif", "<u2", 1000, 3000),
        ("x.tif", ">u2", 1000, 3000),
        ("x.tif", "int32", -70000, 90000),
        ("x.tif", "float32", 0, 1),
        ("x.tif", "float32", -3e38, 3e38),
    ],
)
def test_images_of_more_than_8_bits_are_scaled_by_their_range(name, dtype, low, high, tmp_path):
    values = np.array([[low, 0.75 * low + 0.25 * high], [0.4 * low + 0.6 * high, high]]).astype(dtype)
    Image.fromarray(values).save(tmp_path / name)
    np.testing.assert_array_equal(gray(tmp_path / name), [[0, 64], [153, 255]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "values, expected",
    [
        ([[0.5, 0.5]], [[0, 0]]),
        ([[np.nan, 2, 3, np.inf, -np.inf]], [[0, 0, 255, 255, 0]]),
        ([[np.nan, np.inf]], [[0, 0]]),
    ],
    ids=["constant", "some not finite", "none finite"],
)
def test_values_that_are_constant_or_not_finite_can_be_scaled(values, expected, tmp_path):
    Image.fromarray(np.array(values, dtype="float32")).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(gray(tmp_path / "x.tif"), expected)


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_unreadable_images_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.png"
    Image.effect_noise((60, 60), 50).save(path)
    path.write_bytes(path.read_bytes()[:600] if content is None else content)
    with pytest.raises(ValueError, match="broken.png: must be an image that can be read"):
        load_image(path)


def test_errors_of_a_decoder_are_refused_by_name(tmp_path):
    (tmp_path / "x.blp").write_bytes(b"BLP2" + b"\xff" * 1200)  # Pillow raises a RuntimeError
    with pytest.raises(ValueError, match="x.blp: must be an image that can be read"):
        load_image(tmp_path / "x.blp")


# ---- folders


def test_every_entry_of_a_folder_is_an_image_or_is_named(tmp_path):
    for name in ("a.PNG", "b.jfif", "c.gif", "d.tiff", "e.jp2", "f.webp", "g.mpo"):
        Image.fromarray(UPRIGHT).save(tmp_path / name, "JPEG" if name == "g.mpo" else None)
    Image.fromarray(UPRIGHT).save(tmp_path / "h", "JPEG")
    (tmp_path / "i.jpg").write_text("an image by its name")
    others = ("LICENSE", "j.txt", "k.pdf", "l.eps", "m.h5", "n.mpg")
    for name in (*others, ".hidden.png", ".hidden"):
        (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken link.png").symlink_to("nowhere")
    found, left = find_images([tmp_path])
    assert [path.name for path, _ in found] == [*"a.PNG b.jfif c.gif d.tiff e.jp2 f.webp g.mpo h i.jpg".split()]
    assert [path.name for path in left] == sorted([*others, "folder.png", "broken link.png"])
    for path, _ in found[:-1]:
        assert load_image(path).size == (40, 30)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source, problem in (
        (tmp_path, "has no image directly in it"),
        (f"{tmp_path}/*.jpg", "no image matches"),
        (tmp_path / "missing", "missing: must be an image, a folder of images or a pattern"),
        ("", "^'': must be an image"),
    ):
        with pytest.raises(FileNotFoundError, match=problem):
            find_images([source])


def test_the_suffixes_are_those_of_pictures():
    assert {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".jfif", ".mpo"} <= image_suffixes()
    assert image_suffixes().isdisjoint({"", ".pdf", ".eps", ".ps", ".h5", ".mpg", ".wmf", ".txt", ".json"})


# ---- pixels of scene graphs


def test_pixels_are_between_0_and_1():
    scene = scenes("validation", 40, 0)[0]
    pixels = read_images([scene])[0][0]
    assert pixels.shape == (3, scene.height, scene.width) and 0 <= pixels.min() < pixels.max() <= 1


def test_pixels_are_resized_to_the_size_of_the_graph():
    scene = scenes("validation", 40, 0)[0]
    smaller = SceneGraph("x", 40, 30, scene.boxes[:0], scene.labels[:0], scene.relations[:0], scene.image)
    assert read_images([smaller])[0][0].shape == (3, 30, 40)


def test_a_graph_without_an_image_is_refused_if_pixels_are_needed():
    graph = SceneGraph("x", 9, 9, torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 3).long())
    with pytest.raises(ValueError, match="must have an image file for a model that reads images"):
        collate([graph], 3, pixels=True)


def test_a_batch_lists_images_whose_file_has_other_proportions(tmp_path):
    path = save(tmp_path / "x.png", 1)
    larger, stretched = graph_of(partial(load_image, path), 80, 60), graph_of(partial(load_image, path), 60, 60)
    assert collate([larger], 1, pixels=True).stretched == {}
    batch = collate([larger, stretched], 1, pixels=True)
    assert batch.stretched == {"x": ((40, 30), (60, 60))}
    assert [image.shape for image in batch.pixels] == [(3, 60, 80), (3, 60, 60)]
    assert batch.to(torch.device("cpu")).stretched == batch.stretched
    assert collate([stretched], 1).stretched == {}


@pytest.mark.parametrize("wrong, workers", [(0, 0), (1, 0), (3, 2)])
def test_the_data_module_names_the_first_stretched_image_and_counts_them(wrong, workers, monkeypatch):
    data = SceneGraphData(batch_size=1, images=True, num_workers=workers)
    right = scenes("test", 60, 0)[:4]
    data.test = right[:1] + [dataclasses.replace(graph, width=3 * graph.width) for graph in right[1 : 1 + wrong]]
    said = []
    monkeypatch.setattr(datamodule.log, "warning", lambda line: said.extend([line] * ("stretched" in line)))
    for _ in range(2):  # each run of the trainer is a new count
        trainer_without_sanity_check().test(MotifsModule(**SMALL_MOTIFS), datamodule=data, verbose=False)
        assert len(said) == min(wrong, 2)
        if wrong:
            width, height = right[1].image().size
            assert said[0].startswith(f"image {right[1].image_id!r} is stretched")
            assert f"{width} x {height} pixels, but its annotations {3 * width} x {height}. `sgalign check" in said[0]
        if wrong > 1:
            assert "3 images were stretched" in said[1]
        said.clear()


def test_an_image_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    """The system writes a part of the bytes then. Pillow alone would leave a truncated image."""
    graph, path = scenes("validation", 1, 0)[0], tmp_path / "image.jpg"
    save_image(graph, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_image(graph, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
