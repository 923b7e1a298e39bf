"""Tests of drawn scene graphs: places of nodes and labels, clipped boxes, fonts, and the meaning of lines."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
pytest.importorskip("matplotlib")
from fontTools.fontBuilder import FontBuilder  # noqa: E402
from fontTools.pens.ttGlyphPen import TTGlyphPen  # noqa: E402
from matplotlib import get_data_path  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.font_manager import fontManager  # noqa: E402
from matplotlib.patches import FancyArrowPatch  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402
from PIL import Image  # noqa: E402
from trainers import scenes  # noqa: E402

from sgalign.data.scenes import OBJECT_NAMES, PREDICATE_NAMES  # noqa: E402
from sgalign.viewing import describe_annotations, draw_scene_graph, fonts  # noqa: E402


def graph_of(boxes, triplets, labels=None):
    objects = [{"label": (labels or {}).get(i, "cat"), "box": list(box)} for i, box in enumerate(boxes)]
    triplets = [{"subject": s, "predicate": p, "object": o} for s, p, o in triplets]
    return {"image_id": "x", "objects": objects, "triplets": triplets}


def drawn(graph, image=(200, 100), annotated=None):
    """Return the drawn figure, with its axes for the image and for the graph."""
    figure = Figure(figsize=(14, 7))
    left, right = figure.subplots(1, 2)
    draw_scene_graph(left, right, graph, image and Image.new("RGB", image), annotated)
    figure.draw_without_rendering()
    return left, right


def rectangles(texts):
    return [text.get_window_extent() for text in texts]


def overlapping(boxes):
    return [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def middle(box):
    return [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]


def arrows(axes):
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def nodes(axes, count):
    return axes.texts[:count]


TWO = [(10, 10, 50, 50), (100, 20, 150, 90)]


@pytest.mark.parametrize("number", range(8))
def test_nodes_do_not_overlap_and_few_labels_do(number):
    scene = scenes("validation", 40, 0)[number]
    graph = describe_annotations(scene, OBJECT_NAMES, PREDICATE_NAMES)
    left, right = drawn(graph, (scene.width, scene.height))
    used = {end for triplet in graph["triplets"][:12] for end in (triplet["subject"], triplet["object"])}
    assert overlapping(rectangles(nodes(right, len(used)))) == []
    assert len(overlapping(rectangles(right.texts))) <= 1
    assert overlapping(rectangles(left.texts)) == []
    for axes in (left, right):
        area = axes.get_window_extent()
        for text in rectangles(axes.texts):
            assert (
                area.x0 - 1 <= text.x0 and text.x1 <= area.x1 + 1 and area.y0 - 1 <= text.y0 and text.y1 <= area.y1 + 1
            )


def test_labels_keep_off_arrowheads_and_arrows_off_other_nodes():
    hidden = crossed = count = 0
    for scene in scenes("validation", 40, 0):
        graph = describe_annotations(scene, OBJECT_NAMES, PREDICATE_NAMES)
        _, right = drawn(graph, (scene.width, scene.height))
        used = {end for triplet in graph["triplets"][:12] for end in (triplet["subject"], triplet["object"])}
        texts = rectangles(right.texts)
        for arrow in arrows(right):
            points = right.transData.transform(arrow.get_path().vertices[:-1])
            head = Bbox.null()
            head.update_from_data_xy(points[-3:])  # both corners and the tip
            assert 5 < max(head.size) < 20
            hidden += any(head.overlaps(label.shrunk(0.9, 0.9)) for label in texts[len(used) :])
            crossed += any(node.count_contains(points) > 2 for node in texts[: len(used)])
            count += 1
    assert count > 200 and hidden <= count / 100 and crossed == 0


def test_boxes_are_clipped_to_the_image():
    boxes = [(-1e6, -50, 60, 40), (150, 50, 1e6, 1e6), (300, 300, 400, 400)]
    left, right = drawn(graph_of(boxes, [(0, "on", 1), (1, "on", 2)]))
    assert left.get_xlim() == (0, 200) and left.get_ylim() == (100, 0)
    assert sorted(patch.get_bbox().extents.tolist() for patch in left.patches) == [[0, 0, 60, 40], [150, 50, 200, 100]]
    assert [text.get_text() for text in nodes(right, 3)] == ["cat 0", "cat 1", "cat 2"]
    assert len(left.texts) == 2


def test_objects_of_a_class_have_one_color_in_both_panels():
    boxes = [*TWO, (60, 60, 90, 90)]
    left, right = drawn(graph_of(boxes, [(0, "on", 1), (1, "on", 2)], labels={2: "dog"}))
    for axes in (left, right):
        colors = {text.get_text(): text.get_bbox_patch().get_facecolor() for text in nodes(axes, 3)}
        assert colors["cat 0"] == colors["cat 1"] != colors["dog 2"]


def test_ten_classes_have_ten_strong_colors():
    from matplotlib.colors import TABLEAU_COLORS, to_hex

    boxes = [(20 * i, 10, 20 * i + 15, 40) for i in range(10)]
    triplets = [(i, "on", i + 1) for i in range(9)]
    for axes in drawn(graph_of(boxes, triplets, {i: f"class {i}" for i in range(10)})):
        colors = {to_hex(text.get_bbox_patch().get_edgecolor()) for text in nodes(axes, 10)}
        assert colors == set(TABLEAU_COLORS.values())


def test_opposite_arrows_lie_apart_and_predicates_of_one_pair_share_an_arrow():
    _, right = drawn(graph_of(TWO, [(0, "on", 1), (0, "near", 1), (1, "under", 0)]))
    there, back = arrows(right)
    middles = [arrow.get_path().vertices[len(arrow.get_path().vertices) // 2] for arrow in (there, back)]
    assert abs(middles[0] - middles[1]).max() > 10
    assert [text.get_text() for text in right.texts[2:]] == ["on\nnear", "under"]


def test_arrows_point_from_the_subject_to_the_object_and_end_at_its_edge():
    _, right = drawn(graph_of(TWO, [(0, "on", 1)]))
    (arrow,) = arrows(right)
    points = right.transData.transform(arrow.get_path().vertices[:-1])
    subject, object_ = rectangles(nodes(right, 2))
    start, end = points[0], min(points, key=lambda point: abs(point - middle(object_)).max())
    assert abs(start - middle(subject)).max() < subject.width
    assert abs(end - middle(object_)).max() < object_.width
    assert not any(object_.contains(*point) for point in points)


def test_annotated_triplets_are_green_and_others_are_gray_and_dashed():
    graph = graph_of(TWO, [(0, "on", 1), (0, "near", 1)])
    _, right = drawn(graph, annotated=graph_of(TWO, [(0, "near", 1)]))
    lines = {text.get_text(): arrow for text, arrow in zip(right.texts[2:], arrows(right), strict=True)}
    assert lines["near"].get_linestyle() in ("-", "solid") and lines["on"].get_linestyle() in ("--", "dashed")
    assert lines["near"].get_edgecolor() != lines["on"].get_edgecolor()
    _, right = drawn(graph)
    assert arrows(right)[0].get_linestyle() in ("-", "solid")


@pytest.mark.parametrize(
    "graph",
    [
        graph_of([], []),
        graph_of([(0, 0, 9, 9)], []),
        graph_of([(0, 0, 9, 9)], [(0, "on", 0), (0, "near", 0)]),
        graph_of([(5, 5, 5, 5)] * 13, [(i, "on", i + 1) for i in range(12)]),
        graph_of([(0, 0, 0, 0), (0, 0, 0, 0)], [(0, f"predicate {i}", 1) for i in range(20)]),
        graph_of(TWO, [(0, "costs $5\nand $6", 1)], labels={0: "a " * 500, 1: "\t"}),
    ],
    ids=["nothing", "no relation", "itself", "one place", "many predicates", "odd names"],
)
@pytest.mark.parametrize("image", [(200, 100), None], ids=["image", "boxes only"])
def test_unusual_graphs_are_drawn(graph, image):
    _, right = drawn(graph, image)
    used = {end for triplet in graph["triplets"][:12] for end in (triplet["subject"], triplet["object"])}
    assert overlapping(rectangles(nodes(right, len(used)))) == []
    assert all(len(line) <= 30 for text in right.texts for line in text.get_text().splitlines())


def test_the_same_graph_gives_the_same_picture():
    torch.manual_seed(0)
    graph = describe_annotations(scenes("validation", 40, 0)[0], OBJECT_NAMES, PREDICATE_NAMES)
    one, other = ([text.get_position() for text in drawn(graph)[1].texts] for _ in range(2))
    assert one == other


# ---- fonts


@pytest.fixture
def warned(monkeypatch):
    monkeypatch.setattr(fonts, "_warned", set())
    lines = []
    monkeypatch.setattr(fonts, "warn", lines.append)
    return lines


def test_a_script_without_a_font_gives_one_warning(warned, monkeypatch):
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(map(chr, range(32, 127))))
    for labels in ({0: "猫"}, {0: "犬"}, {1: "猫"}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, right = drawn(graph_of(TWO, [(0, "on", 1)], labels))
        assert any(fonts.UNKNOWN in text.get_text() for text in right.texts)
    assert len(warned) == 1 and "'猫'" in warned[0]


def test_matplotlibs_font_of_boxes_does_not_hide_a_missing_character(warned, monkeypatch):
    """One font of matplotlib has a box for every character. A lone surrogate cannot be drawn at all."""
    own = [entry for entry in fontManager.ttflist if Path(entry.fname).is_relative_to(get_data_path())]
    monkeypatch.setattr(fontManager, "ttflist", own)
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    fonts._find_new_fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, right = drawn(graph_of(TWO, [(0, "\ud800n", 1)], {0: "猫", 1: "dog"}))
    assert [text.get_text() for text in right.texts] == [f"{fonts.UNKNOWN} 0", "dog 1", f"{fonts.UNKNOWN}n"]
    assert len(warned) == 1 and "猫" in warned[0] and "fonts-noto-cjk" in warned[0]


def test_a_font_that_was_installed_after_matplotlibs_list_is_found(warned, monkeypatch, tmp_path):
    path = tmp_path / "cat.ttf"
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("\U000f0000"): "cat"})
    pen = TTGlyphPen(None)
    for point, move in zip([(0, 0), (0, 700), (700, 700)], [pen.moveTo, pen.lineTo, pen.lineTo]):
        move(point)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (700, 0), "cat": (700, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Cat Test Font", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(path)])
    fonts._find_new_fonts.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, right = drawn(graph_of(TWO, [(0, "on", 1)], {0: "\U000f0000", 1: "dog"}))
    fonts._find_new_fonts.cache_clear()
    assert right.texts[0].get_text() == "\U000f0000 0" and "Cat Test Font" in right.texts[0].get_fontfamily()
    assert warned == []


def test_a_font_that_has_the_characters_is_used(warned, monkeypatch):
    has = {"DejaVu Sans": "abc", "Cat Font": "猫a", "Dog Font": "犬"}
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(has[path]))
    entries = [type("Entry", (), {"name": name, "fname": name}) for name in has]
    monkeypatch.setattr(fontManager, "ttflist", entries)
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    assert fonts.families_for(["ab"]) == (["DejaVu Sans"], "")
    assert fonts.families_for(["a猫"]) == (["DejaVu Sans", "Cat Font"], "")
    assert fonts.families_for(["猫犬x"]) == (["DejaVu Sans", "Cat Font", "Dog Font"], "x")
    assert len(warned) == 1 and "'x'" in warned[0]


def test_names_in_latin_and_greek_need_no_search(warned):
    assert fonts.families_for(["dog Ärmel αβγ …"]) == (["DejaVu Sans"], "") and warned == []
