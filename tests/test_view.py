"""Tests of `sgalign view` and of its page, which a headless Chromium opens."""

import json
import logging
import shutil

import h5py
import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics")
from sgalign.commands.main import main  # noqa: E402
from sgalign.data import PredictionFile, open_dataset  # noqa: E402
from sgalign.data.graph_lines import read_graph_lines  # noqa: E402
from sgalign.metrics import SceneGraphEvaluator  # noqa: E402
from sgalign.viewing import PageImage, describe_annotations, write_page  # noqa: E402
from sgalign.viewing.comparison import finders  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
HOSTILE = "</script><img src=x onerror=\"document.title='run'\">'\u2028\U0001f6b2"


def item(label, box, score=0.9):
    return {"label": label, "box": box, "score": score}


def triplet(subject, predicate, object_, score=0.5):
    return {"subject": subject, "predicate": predicate, "object": object_, "score": score}


def graph(**changes):
    objects = [item("man", [0, 0, 50, 90]), item("horse", [10, 40, 90, 99]), item("hat", [5, 0, 20, 10])]
    triplets = [triplet(0, "rides", 1, 0.8), triplet(0, "wears", 2, 0.4), triplet(1, "under", 0, 0.1)]
    return {"image_id": "a.jpg", "objects": objects, "triplets": triplets} | changes


def without_scores(value):
    rows = {field: [{k: v for k, v in row.items() if k != "score"} for row in value[field]] for field in FIELDS}
    return value | rows


FIELDS = ("objects", "triplets")


def write_lines(path, *graphs):
    path.write_text("".join(json.dumps(one) + "\n" for one in graphs))
    return path


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-sync", *QUIET]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that writes a page of images and opens it. It may load nothing and report no error."""
    requests, errors, tabs = [], [], []

    def show(*images, width=1200, **options):
        path = tmp_path / "page.html"
        write_page(path, images, options.pop("title", "Graphs"), **options)
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.set_default_timeout(10_000)
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("console", lambda message: errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield show
    for tab in tabs:
        tab.close()
    assert [url[:80] for url in requests if not url.startswith(("data:image/jpeg", "file:"))] == [] and errors == []
    assert sum(url.startswith("file:") for url in requests) == len(tabs)


def photograph():
    return Image.new("RGB", (1600, 900), "teal")


def lit(tab, selector):
    return tab.eval_on_selector_all(f"{selector}.lit", "parts => parts.map((part) => part.textContent)")


def test_the_slider_changes_the_shown_relations(opened):
    tab = opened(PageImage("a.jpg", photograph, 100, 100, graph()))
    assert tab.text_content("#count") == "3 of 3 predicted relations shown."
    tab.focus("#threshold")
    tab.keyboard.press("End")
    assert tab.text_content("#count") == "1 of 3 predicted relations shown."
    assert tab.locator(".relations li").count() == 1 and tab.locator(".edge polygon").count() == 1
    assert tab.locator(".frame .box").count() == 2, "the hat has no shown relation"
    tab.check("#others")
    assert tab.locator(".frame .box").count() == 3


@pytest.mark.parametrize("place", [".relations button >> nth=1", '.edge[data-index="1"] text'])
def test_a_clicked_relation_lights_up_both_ends(opened, place):
    tab = opened(PageImage("a.jpg", photograph, 100, 100, graph()))
    tab.click(place)
    assert set(lit(tab, ".tag")) == {"man 0 0.90", "hat 2 0.90"}
    assert set(lit(tab, ".node")) == {"man 0man 0", "hat 2hat 2"}  # the name and its tooltip
    assert tab.locator(".frame g.lit").count() == 2
    assert tab.get_attribute(".relations button >> nth=1", "aria-pressed") == "true"


def test_keys_choose_images_and_relations(opened):
    images = [PageImage(name, photograph, 100, 100, graph()) for name in ("a.jpg", "b.jpg")]
    tab = opened(*images)
    pressed = "[aria-pressed=true]"
    for key, expected in (("j", 0), ("ArrowDown", 1), ("k", 0), ("ArrowUp", 0)):
        tab.keyboard.press(key)
        assert tab.get_attribute(pressed, "data-index") == str(expected), key
    tab.keyboard.press("Escape")
    assert tab.locator(pressed).count() == 0 and lit(tab, ".tag") == []
    for key, expected in (("ArrowRight", "b.jpg"), ("ArrowRight", "b.jpg"), ("ArrowLeft", "a.jpg")):
        tab.keyboard.press(key)
        assert tab.text_content("#name") == expected
    tab.focus("#threshold")
    tab.keyboard.press("ArrowRight")
    assert tab.text_content("#name") == "a.jpg" and tab.input_value("#threshold") == "1"


def test_hostile_names_are_text(opened):
    objects = [item(HOSTILE, [0, 0, 9, 9]), item("b", [5, 5, 30, 30])]
    hostile = graph(objects=objects, triplets=[triplet(0, HOSTILE, 1)])
    tab = opened(PageImage(HOSTILE, None, 100, 100, hostile), title=HOSTILE)
    for place in ("h1", "#name", ".thumbnails .name"):
        assert tab.text_content(place) == HOSTILE
    assert HOSTILE in tab.text_content("h1") and HOSTILE in tab.text_content(".relations .predicate")
    assert tab.text_content(".relations .chip >> nth=0") == f"{HOSTILE} 0"
    assert tab.title() != "run" and tab.locator("img[src=x]").count() == 0


def test_found_and_missed_relations_are_marked_at_every_threshold(opened):
    annotated = without_scores(graph(triplets=[triplet(0, "wears", 2), triplet(2, "on", 0)]))
    tab = opened(PageImage("a.jpg", photograph, 100, 100, graph(), annotated))
    marks = '[aria-label="{}: relations"] .mark'

    def texts(side):
        return tab.locator(marks.format(side)).all_text_contents()

    assert texts("Annotations") == ["✓ found", "✗ missed"]
    assert texts("Prediction") == ["no match", "✓ found", "no match"]
    assert tab.text_content("#found") == "Found 1 of 2 annotated relations."
    assert "find: 1 of 2" in tab.text_content("#notes")
    tab.click('[aria-label="Annotations: relations"] button >> nth=0')
    assert len(lit(tab, '[aria-label="Prediction"] .node')) == 2, "the prediction that finds it is lit, too"
    tab.focus("#threshold")
    tab.keyboard.press("End")  # hides the prediction that finds it
    assert texts("Annotations") == ["✗ missed", "✗ missed"]
    assert tab.text_content("#found") == "Found 0 of 2 annotated relations."


def test_a_narrow_window_needs_no_horizontal_scrolling(opened):
    tab = opened(PageImage("a" * 90, photograph, 100, 100, graph(), without_scores(graph())), width=340)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 340


def test_a_page_has_a_limited_number_of_images_and_triplets(tmp_path, monkeypatch):
    monkeypatch.setattr("sgalign.viewing.page.MOST_IMAGES", 2)

    def broken():
        raise OSError("cut short")

    images = (PageImage(str(place), broken if place else photograph, 100, 100, graph()) for place in range(5))
    content = write_page(tmp_path / "page.html", images, "Graphs", top_k=1)
    assert (content.images, content.left_out, content.boxes_only, content.triplets_left_out) == (2, 3, 1, 4)
    page = (tmp_path / "page.html").read_text()
    assert "Left out: 3 images" in page and "Boxes only: 1 image" in page and "cut short" in page


def test_relations_are_found_as_the_evaluator_finds_them():
    torch.manual_seed(0)
    for _ in range(20):
        boxes = torch.rand(6, 4).mul(20).round()
        boxes[:, 2:] += boxes[:, :2]
        labels, relations = torch.randint(1, 3, (6,)), torch.randint(0, 6, (8, 3))
        relations[:, 2] = relations[:, 2] % 2 + 1
        moved = boxes + torch.rand(6, 4).mul(6).round() * torch.tensor([0, 0, 1, 1])
        ranked = {"boxes": moved, "labels": labels, "triplets": relations, "triplet_scores": torch.rand(8)}
        evaluator = SceneGraphEvaluator("sgdet", 2, top_k=(8,))
        evaluator.update([ranked], [{"boxes": boxes, "labels": labels, "relations": relations}])

        def named(corners, labels=labels, relations=relations):
            objects = [{"label": str(k), "box": b} for k, b in zip(labels.tolist(), corners.tolist())]
            return {"objects": objects, "triplets": [triplet(s, str(p), o) for s, o, p in relations.tolist()]}

        found = finders(named(moved), named(boxes))
        assert sum(map(bool, found)) / 8 == evaluator.compute()["R@8"].item()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    assert main(["make-dataset", str(folder), "--format", "coco", "--sizes", "2", "0", "3"]) == 0
    return folder


def perfect(scenes):
    """Return the annotations of the test split as predictions."""
    dataset = open_dataset(scenes, "test")
    graphs = [describe_annotations(one, dataset.object_names, dataset.predicate_names) for one in dataset]
    for one in graphs:
        for row in one["objects"] + one["triplets"]:
            row["score"] = 1.0
    return graphs


def test_shards_of_lines_are_compared_with_annotations(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two, _ = perfect(scenes)
    shards = [write_lines(tmp_path / f"{name}.jsonl", shard) for name, shard in (("a", one), ("b", two))]
    total = len(one["triplets"]) + len(two["triplets"])
    command = ["view", *map(str, shards), "--annotations", str(scenes), "--top-k", "100"]
    with pytest.raises(SystemExit):
        main(command)
    assert "--out must be given" in capsys.readouterr().err
    assert main([*command, "--out", "a.html"]) == 0
    out = capsys.readouterr().out
    found = "Annotated relations that the predictions on the page find"
    assert f"wrote a.html: 2 images. {found}: {total} of {total}.\n" in out
    assert "Left out: 1 image of the test split, because no file has a prediction." in out
    assert (tmp_path / "a.html").read_text().count("data:image/jpeg") == 4


@pytest.mark.parametrize("suffix", [".h5", ".json"])
def test_files_of_predictions_get_names_from_the_annotations(scenes, tmp_path, capsys, suffix):
    path, first = tmp_path / f"p{suffix}", open_dataset(scenes, "test")[0]
    ranked = {"boxes": first.boxes, "labels": first.labels, "triplets": first.relations}
    ranked["triplet_scores"] = torch.ones(len(first.relations))
    if suffix == ".h5":
        with PredictionFile(path) as file:
            file.write(first.image_id, ranked)
    else:
        path.write_text(json.dumps({first.image_id: {name: value.tolist() for name, value in ranked.items()}}))
    page = tmp_path / "page.html"
    assert main(["view", str(path), "--annotations", str(scenes), "--top-k", "99", "--out", str(page)]) == 0
    count = len(first.relations)
    assert f"1 image. Annotated relations that the predictions on the page find: {count} of {count}.\n" in (
        capsys.readouterr().out
    )
    assert main(["view", str(path), "--annotations", str(scenes), "--top-k", "1", "--out", str(page)]) == 0
    assert f"Left out: {count - 1} triplets, because each image shows its 1 best." in (capsys.readouterr().out)
    assert main(["view", str(path), "--out", str(page)]) == 1
    assert "needs --annotations" in capsys.readouterr().err


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1.0])
def test_scores_of_objects_must_be_numbers_that_a_page_can_show(scenes, tmp_path, capsys, score):
    first = open_dataset(scenes, "test")[0]
    scores = torch.full((len(first.labels),), score)
    ranked = {"boxes": first.boxes, "labels": first.labels, "scores": scores, "triplets": first.relations}
    with PredictionFile(tmp_path / "p.h5") as file:
        file.write(first.image_id, ranked | {"triplet_scores": torch.ones(len(first.relations))})
    assert main(["view", str(tmp_path / "p.h5"), "--annotations", str(scenes), "--out", str(tmp_path / "a.html")]) == 1
    assert "scores must be finite and at least 0" in capsys.readouterr().err


def test_lines_for_another_size_of_an_image_are_not_compared(scenes, tmp_path, capsys):
    annotated = open_dataset(scenes, "test")[0]
    line = perfect(scenes)[0] | {"width": annotated.width, "height": annotated.height}
    command = ["view", str(tmp_path / "p.jsonl"), "--annotations", str(scenes), "--out", str(tmp_path / "page.html")]
    write_lines(tmp_path / "p.jsonl", line)
    assert main(command) == 0
    write_lines(tmp_path / "p.jsonl", line | {"width": 2 * annotated.width, "height": 2 * annotated.height})
    assert main(command) == 1
    assert f"line 1: width and height must be {annotated.width} x {annotated.height}" in capsys.readouterr().err


def test_a_folder_shows_its_annotations(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["view", str(scenes), "--split", "train"]) == 0
    assert capsys.readouterr().out == "wrote coco.html: 2 images.\n"


def test_photographs_come_from_the_line_or_the_folder(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    photograph().save(tmp_path / "photos" / "a.jpg")
    lines = write_lines(tmp_path / "p.jsonl", graph(file="photos/a.jpg", width=1600, height=900), graph(image_id="b"))
    arguments = ["view", str(lines), "--out", str(tmp_path / "page.html")]
    assert main(arguments) == 0
    assert "2 images. Boxes only: 1 image, because the image file is missing" in capsys.readouterr().out
    lines = write_lines(tmp_path / "p.jsonl", graph())
    assert main([*arguments, "--images", str(tmp_path / "photos")]) == 0
    assert capsys.readouterr().out.endswith("page.html: 1 image.\n")


@pytest.mark.parametrize(
    "second, message",
    [
        ("{]", "line 2: must be a JSON object, but is damaged"),
        ("[1]", r"line 2: must be a JSON object, got \[1\]"),
        (json.dumps(graph())[:-1] + ', "image_id": "b"}', "line 2: .*the key 'image_id' occurs twice"),
        (graph(image_id=3), "line 2: image_id must be text"),
        (graph(objects={}), "line 2: objects must be a list"),
        (graph(objects=[item("man", [5, 0, 1, 9])]), r"line 2: objects\[0\].box must be x1, y1, x2, y2"),
        (graph(triplets=[triplet(0, "on", 3)]), r"triplets\[0\].object must be the index of one of 3 objects, got 3"),
        (graph(triplets=[triplet(0, "on", 1, float("nan"))]), r"triplets\[0\].score must be a finite number"),
        (graph(width=0, height=4), "line 2: width and height must be"),
        (graph(objects=[item("man", [0, 0, 10**400, 9])]), r"line 2: objects\[0\].box must be x1, y1, x2, y2"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, second, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(graph())}\n{second if isinstance(second, str) else json.dumps(second)}\n")
    with pytest.raises(ValueError, match=message):
        list(read_graph_lines(path))


def test_a_line_that_was_cut_short_is_left_out(tmp_path, caplog):
    path = write_lines(tmp_path / "p.jsonl", graph())
    path.write_text(path.read_text() + json.dumps(graph())[:40])
    with caplog.at_level(logging.WARNING, "sgalign"):
        assert len(list(read_graph_lines(path))) == 1
    assert "line 2: left out" in caplog.text


def test_an_empty_file_is_accepted_only_beside_one_with_graphs(tmp_path, capsys):
    path, empty = write_lines(tmp_path / "p.jsonl", graph()), tmp_path / "empty.jsonl"
    empty.touch()
    page = tmp_path / "page.html"
    assert main(["view", str(empty), "--out", str(page)]) == 1
    assert "must have at least one image, got none" in capsys.readouterr().err and not page.exists()
    assert main(["view", str(empty), str(path), "--out", str(page)]) == 0


def test_images_and_classes_must_fit_the_annotations(scenes, tmp_path, capsys):
    first = perfect(scenes)[0]
    wrong = first | {"objects": [one | {"label": "unicorn"} for one in first["objects"]]}
    page = tmp_path / "page.html"
    for lines, message in (
        ([graph(image_id="unknown")], "line 1: image ids must be in the test split"),
        ([wrong], "line 1: every label must be a class of"),
        ([first, first], "line 2: every image must occur once"),
    ):
        path = write_lines(tmp_path / "p.jsonl", *lines)
        assert main(["view", str(path), "--annotations", str(scenes), "--out", str(page)]) == 1
        assert message in capsys.readouterr().err and not page.exists()


def test_the_input_is_not_overwritten(tmp_path, capsys):
    path = write_lines(tmp_path / "p.html", graph())
    with pytest.raises(SystemExit):
        main(["view", str(path), "--out", str(path)])
    assert "--out must not be one of the files to view" in capsys.readouterr().err
    with h5py.File(tmp_path / "p.h5", "w"), pytest.raises(SystemExit):
        main(["view", str(path), "--out", str(tmp_path / "p.h5")])
