"""Fuzz the readers of all files except data sets: detections, predictions, features, checkpoints, studies, images."""

from __future__ import annotations

import functools
import io
import json
import re
import struct
import sys
import tempfile
import types
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from fuzzing import (
    ODD,
    Draw,
    changed_array,
    changed_bytes,
    changed_csv,
    changed_json,
    instrumented,
    main,
    one_of,
    write_hdf5,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from PIL import Image
from safetensors.torch import save as safetensors

sys.path.insert(0, str(Path(__file__).parents[1]))
with instrumented():
    from trainers import trainer_without_sanity_check

    from sgalign.commands.main import _sentence
    from sgalign.data import SceneGraph
    from sgalign.data.class_names import BACKGROUND, read_classes
    from sgalign.data.detections import ids_of_names, read_detections
    from sgalign.data.features import FIELDS, FeatureCache
    from sgalign.data.graph_lines import is_graph_lines, read_graph_lines
    from sgalign.data.image_ids import ImageIds
    from sgalign.data.images import image_sizes, image_suffixes, is_image, load_image
    from sgalign.data.prediction_reading import Annotations, Predictions
    from sgalign.data.predictions import prediction_ids
    from sgalign.data.scene_graph import check_range
    from sgalign.data.triplets import read_zero_shot_triplets
    from sgalign.data.word_vectors import read_word_vectors
    from sgalign.errors import InputError
    from sgalign.files import read_json, read_tensors
    from sgalign.matching import check_prediction, check_scores, rank_triplets
    from sgalign.models.detector import Detector
    from sgalign.models.sgtr_weights import load_published
    from sgalign.prediction.image_paths import ImageFile
    from sgalign.prediction.outputs import GraphLines, PredictionParts, options_of, parts_folder
    from sgalign.prediction.predicting import PredictedImage
    from sgalign.studies import claims, report
    from sgalign.studies.execute import latest_checkpoint
    from sgalign.studies.results import Result, digest, read_result, run_folder
    from sgalign.studies.study import read_study
    from sgalign.training import EntityDetectorModule, MotifsModule, SceneGraphData, SGTRModule, load_module
    from sgalign.training.checkpoints import read_checkpoint
    from sgalign.training.detr import make_detector
    from sgalign.training.model_card import model_card, read_results
    from sgalign.training.pretrained import is_pretrained
    from sgalign.training.saved_states import check_resumable
    from sgalign.training.starting import load_detector, read_start, start
    from sgalign.viewing import PageImage, describe, write_page

OBJECTS, PREDICATES = [BACKGROUND, "person", "horse"], [BACKGROUND, "on", "above"]
BOXES = [[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 50.0, 44.0]]
GRAPHS = [
    SceneGraph(name, 64, 48, torch.tensor(BOXES), torch.tensor([1, 2]), torch.tensor([[0, 1, 1], [1, 0, 2]]))
    for name in ("a.jpg", "d/b.jpg")
]
ANNOTATIONS = Annotations(OBJECTS, PREDICATES, GRAPHS, {"7": "a.jpg", "8": "d/b.jpg"})
SIZES: dict[str, Any] = {"embed_dim": 4, "hidden_dim": 4, "relation_dim": 4}


def write_text(draw: Draw, path: Path, text: str) -> str:
    """Write a text and return it. Of 50 files, 5 get changed bytes and one gets only random bytes."""
    content, action = text.encode(errors="surrogateescape"), draw.ConsumeIntInRange(0, 49)
    if action == 49:
        content = draw.ConsumeBytes(1000)
    elif action >= 44:
        content = changed_bytes(draw, content)
    path.write_bytes(content)
    return content.decode(errors="replace")


def write_json(draw: Draw, path: Path, content: Any) -> str:
    return write_text(draw, path, json.dumps(changed_json(draw, content)))


# ---- detections and predictions


def detections(draw: Draw, folder: Path) -> None:
    row = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40.5], "score": 0.5}
    forms: list[Any] = [
        {"a.jpg": {"boxes_xyxy": BOXES, "labels": [0, "horse"], "scores": [1, 0.5]}},
        [row, row | {"image_id": "b", "category_id": "horse"}, row | {"category": "person"}],
    ]
    ids = functools.partial(ids_of_names, ["a.jpg", "d/b.jpg"], OBJECTS) if draw.ConsumeBool() else None
    text = write_json(draw, path := folder / "detections.json", one_of(draw, *forms))
    found = read_detections(path, OBJECTS, ids)
    content = json.loads(text)
    for name, (boxes, labels, scores) in found.items():
        assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64
        assert boxes.shape == (len(labels), 4) and scores.shape == labels.shape and boxes.isfinite().all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all() and ((scores >= 0) & (scores <= 1)).all()
        assert ((labels >= 1) & (labels <= 2)).all()
        if isinstance(content, dict):
            classes = [
                OBJECTS.index(label) if isinstance(label, str) else label + 1 for label in content[name]["labels"]
            ]
            assert labels.tolist() == classes
            assert boxes.equal(torch.tensor(content[name]["boxes_xyxy"], dtype=torch.float32).reshape(-1, 4))
    if isinstance(content, list) and ids is None:
        assert sum(len(image.labels) for image in found.values()) == len(content)


SCORES = [[0.1, 0.6, 0.3], [0.2, 0.1, 0.7]]
FORMS: dict[str, Any] = {
    "own": {"boxes": BOXES, "labels": [1, 2], "scores": [0.9, 0.8], "pairs": [[0, 1], [1, 0]],
            "predicate_scores": SCORES},
    "ranked": {"boxes": BOXES, "labels": ["person", 2], "triplets": [[0, 1, "on"], [1, 0, 2]],
               "triplet_scores": [0.9, 0.1]},
    "described": {"objects": [{"label": "person", "box": BOXES[0], "score": 0.5}, {"label": "horse", "box": BOXES[1]}],
                  "triplets": [{"subject": 0, "object": 1, "predicate": "on", "score": 0.5}]},
    "motifs": {"pred_boxes": BOXES, "pred_classes": [1, 2], "obj_scores": [0.9, 0.8], "pred_rel_inds": [[0, 1]],
               "rel_scores": [[0.6, 0.3]]},
    "pairs": {"boxes": BOXES, "labels": [1, 2], "scores": [0.9, 0.8], "pairs": [[0, 1], [1, 0]], "rel_labels": [1, 2],
              "rel_scores": [0.4, 0.5]},
    "reltr": {"sub_boxes": BOXES[:1], "sub_classes": [1], "sub_scores": [0.5], "obj_boxes": BOXES[1:],
              "obj_classes": ["horse"], "obj_scores": [0.5], "rel_scores": [[0.1, 0.2, 0.3]]},
    "custom": {"bbox": BOXES, "bbox_labels": [1, 2], "bbox_scores": [0.9, 0.8], "rel_pairs": [[0, 1]],
               "rel_labels": [1], "rel_all_scores": [[0.1, 0.6, 0.3]]},
    "sgbench": {"bboxes": BOXES, "categories": [0, 1], "triplets": [[0, 1, 0], [1, 0, 1]]},
}  # fmt: skip


def read_all(path: Path, resized: tuple[int, int] | None = None) -> None:
    """Read all predictions of a file as `sgalign view` does, and check what loads."""
    file = Predictions(path, ANNOTATIONS, resized=resized)
    for image_id in file.image_ids:
        prediction, where = file[image_id], f"{path}, image {image_id!r}: "
        check_prediction(where, prediction, len(PREDICATES) - 1)
        check_range(where, "labels", prediction["labels"], 1, len(OBJECTS) - 1)
        ranked = rank_triplets(prediction, 3, 1)
        assert len(ranked.scores) <= 3 and ranked.scores.isfinite().all()
        assert ((ranked.predicates >= 1) & (ranked.predicates <= 2)).all()
        if "scores" in prediction:
            check_scores(where, "scores", prediction["scores"], (len(prediction["labels"]),))
            describe({"image_id": image_id} | prediction, OBJECTS, PREDICATES, 3)


def predictions_json(draw: Draw, folder: Path) -> None:
    kind = one_of(draw, *FORMS)
    form, suffix = FORMS[kind], ".json"
    content: Any = {"a.jpg": form, "b": form}
    if kind == "custom":
        info = {"idx_to_files": ["/x/a.jpg", "b.jpg"], "ind_to_classes": OBJECTS, "ind_to_predicates": PREDICATES}
        write_json(draw, folder / "custom_data_info.json", info)
        content = {"0": form, "1": form}
    elif kind == "sgbench":
        content = {"images": [form | {"id": "a"}, form | {"id": 8}]}
    elif draw.ConsumeBool():
        content = [{"image_id": 7} | form, {"file_name": "x/b.jpg"} | form]
        suffix = one_of(draw, ".json", ".jsonl")
    path = folder / f"predictions{suffix}"
    if suffix == ".jsonl":
        write_text(draw, path, "".join(json.dumps(changed_json(draw, row, 2)) + "\n" for row in content))
    else:
        write_json(draw, path, content)
    read_all(path, (24, 40) if draw.ConsumeIntInRange(0, 4) == 0 and suffix == ".json" else None)


def predictions_hdf5(draw: Draw, folder: Path) -> None:
    form = FORMS[one_of(draw, "own", "motifs", "pairs", "reltr")]
    arrays = {}
    for image in ("a.jpg", "d/b.jpg"):
        for name, values in form.items():
            array = np.array(values) if name not in ("obj_classes",) else np.array([2])
            arrays[f"{image}/{name}"] = array.astype(np.float32) if array.dtype == np.float64 else array
    write_hdf5(draw, path := folder / "predictions.h5", arrays, {"x": 1})
    read_all(path)


def _box_list() -> type:
    names = ["maskrcnn_benchmark", "maskrcnn_benchmark.structures", "maskrcnn_benchmark.structures.bounding_box"]
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    kind = type("BoxList", (), {"__module__": names[-1], "__qualname__": "BoxList"})
    sys.modules[names[-1]].BoxList = kind  # type: ignore[attr-defined]
    return kind


BOX_LIST = _box_list()


def changed_tensors(draw: Draw, content: Any) -> Any:
    """Return nested lists and dicts with some of their parts changed, among them tensors."""

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensor = value
            if value.dtype != torch.bool and draw.ConsumeIntInRange(0, 30) == 30:
                array = changed_array(draw, value.detach().numpy())
                tensor = torch.from_numpy(array) if array.dtype.kind in "iufb" and array.dtype.isnative else value
            if draw.ConsumeIntInRange(0, 60) == 60:
                odd = [tensor.to_sparse, tensor.bfloat16, tensor.half, tensor.bool, lambda: tensor.to(torch.complex64)]
                odd += [lambda: torch.nn.Parameter(tensor.float()), lambda: tensor[:1].expand(3, *tensor.shape[1:])]
                odd += [
                    lambda: tensor.to("meta"),
                    lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
                ]
                try:
                    return one_of(draw, *odd)() if tensor.dim() else tensor
                except RuntimeError:  # for an empty tensor, or for large unsigned numbers, which have few operations
                    return tensor
            return tensor
        if isinstance(value, dict):
            walked = {name: walk(part) for name, part in value.items()}
            if "bbox" in walked and "mode" in walked:
                boxes = BOX_LIST()
                vars(boxes).update({str(name): part for name, part in walked.items()})
                return boxes
            return walked
        return [walk(part) for part in value] if isinstance(value, list) else value

    return walk(changed_json(draw, content, 3))


def save_tensors(draw: Draw, path: Path, content: Any) -> None:
    torch.save(changed_tensors(draw, content), path, _use_new_zipfile_serialization=draw.ConsumeIntInRange(0, 4) > 0)
    action = draw.ConsumeIntInRange(0, 19)
    if action == 18:  # never when the input has no more bytes, which draw the lowest value
        path.write_bytes(changed_bytes(draw, path.read_bytes()))
    elif action == 19:
        path.write_bytes(draw.ConsumeBytes(1000))


def eval_results(draw: Draw, folder: Path) -> None:
    shape = {"size": [64, 48], "mode": one_of(draw, "xyxy", "xywh"), "bbox": torch.tensor(BOXES)}
    corners = shape | {"mode": "xyxy"}
    truth = {"labels": torch.tensor([1, 2]), "relation_tuple": torch.tensor([[0, 1, 1], [1, 0, 2]])}
    found = {"pred_labels": torch.tensor([1, 2]), "pred_scores": torch.tensor([0.9, 0.8])}
    found |= {"rel_pair_idxs": torch.tensor([[0, 1], [1, 0]]), "pred_rel_scores": torch.tensor(SCORES)}
    content = {
        "predictions": [shape | {"extra_fields": found} for _ in GRAPHS],
        "groundtruths": [corners | {"extra_fields": truth} for _ in GRAPHS],
    }
    save_tensors(draw, path := folder / f"eval_results{one_of(draw, '.pytorch', '.pt')}", content)
    if draw.ConsumeBool():
        write_json(draw, folder / "visual_info.json", [{"img_file": "/x/a.jpg"}, {"img_file": "b.jpg"}])
    read_all(path)


def image_ids(draw: Draw, folder: Path) -> None:
    odd = [value for value in ODD if isinstance(value, str)]
    names = ["a.jpg", "b.png", "d/a.jpg", "a", *(draw.ConsumeUnicode(6) for _ in range(3)), one_of(draw, *odd)]
    known = {"7": "a.jpg", "9": "gone.jpg", draw.ConsumeUnicode(3): one_of(draw, *names)}
    given = one_of(draw, *names, *known, *(f"/x/{name}" for name in names), draw.ConsumeUnicode(6))
    names = list(dict.fromkeys(names))

    def parts(name: str) -> list[str]:
        path = Path(name)
        return [path.name] + [path.stem] * (path.suffix.lower() in image_suffixes())

    wanted = [[name for name in names if part in parts(name)] for part in parts(given)]
    first = next((found for found in wanted if found), [None])
    if given in names:
        first = [given]
    elif given in known:
        first = [known[given]] if known[given] in names else [None]
    try:
        found = ImageIds(names, known).find(f"{folder}", given)
    except InputError:
        assert len(first) > 1
        raise
    assert [found] == first, (given, names, known)


def graph_lines(draw: Draw, folder: Path) -> None:
    graph = {"image_id": "a.jpg", "file": "x/a.jpg", "width": 64, "height": 48} | FORMS["described"]
    graph["objects"] = [item | {"score": 0.5} for item in graph["objects"]]
    lines = [json.dumps(changed_json(draw, graph, 2)) for _ in range(2)]
    path = folder / one_of(draw, "graphs.jsonl", "graphs.json")
    text = write_text(draw, path, "\n".join(lines) + one_of(draw, "\n", "", "\n\n"))
    if not is_graph_lines(path):
        assert path.suffix != ".jsonl"
        return
    read = [line.graph for line in read_graph_lines(path)]
    plain = [line for line in re.split(b"\n", path.read_bytes()) if line.strip()]
    assert len(plain) - 1 <= len(read) <= len(plain), text
    for line, graph in zip(plain, read):
        own = json.loads(line)
        assert own | {"width": graph.get("width"), "height": graph.get("height")} == graph | {
            "width": graph.get("width"), "height": graph.get("height")
        }  # fmt: skip
        assert type(graph.get("width")) in (int, type(None))
    images = [PageImage(graph["image_id"], None, graph.get("width"), graph.get("height"), graph) for graph in read]
    write_page(folder / "page.html", images, "<title>")


# ---- features, word vectors, class names, images


def features(draw: Draw, folder: Path) -> None:
    arrays = {}
    for image in ("a.jpg", "d%2Fb.jpg"):
        values = {"boxes": np.array(BOXES, "f4"), "objects": np.ones((2, 3), "f2"), "logits": np.ones((2, 3), "f4")}
        arrays |= {f"{image}/{name}": array for name, array in (values | {"union": np.ones((2, 3), "f4")}).items()}
    write_hdf5(draw, folder / "features_00000.h5", arrays, {"weights": "x", "dtype": "float32", "sizes": "600 1000"})
    cache = FeatureCache(folder)
    assert cache.source
    for name in ("a.jpg", "d/b.jpg"):
        image = cache[name]
        count = len(image["boxes"])
        assert all(image[field].dtype == torch.float32 for field in FIELDS)
        assert image["boxes"].shape == (count, 4) and image["logits"].dim() == image["objects"].dim() == 2
        assert len(image["logits"]) == len(image["objects"]) == count and image["union"].dim() == 2
        assert len(image["union"]) == count * (count - 1)


def word_vectors(draw: Draw, folder: Path) -> None:
    words = ["person", "horse", "traffic_light", "light", "x", "__background__", draw.ConsumeUnicodeNoSurrogates(3)]
    odd = ["1", "-0.5", "1e3", "nan", "inf", "1e39", "x", "", "1_0", "0x1", "é"]
    lines = ["3 4"] if draw.ConsumeBool() else []
    for _ in range(5 - draw.ConsumeIntInRange(0, 5)):
        numbers = ["0.25", "1", "-2", "3e-1"]
        if draw.ConsumeIntInRange(0, 3) == 3:
            numbers = [one_of(draw, *odd) for _ in range(draw.ConsumeIntInRange(0, 5))]
        lines.append(" ".join([one_of(draw, *words), *numbers]))
    text = write_text(draw, path := folder / "vectors.txt", "\n".join(lines))
    names = [BACKGROUND, "person", "traffic light"]
    table = read_word_vectors(path, names)
    assert table.dtype == torch.float32 and table.shape[0] == len(names) and table.isfinite().all()
    rows: dict[str, list[str]] = {}
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if parts := line.split():
            rows.setdefault(parts[0], parts[1:])
    for name, candidates in (("person", ["person"]), ("traffic light", ["traffic_light", "traffic"])):
        word = next((word for word in candidates if word in rows), None)
        if word is not None and len(rows[word]) == table.shape[1]:
            numbers = [float(number) for number in rows[word]]
            assert table[names.index(name)].equal(torch.tensor(numbers)), (word, rows[word])


def zero_shot_triplets(draw: Draw, folder: Path) -> None:
    rows = [["1", "2", "1"], ["2", "1", "2"]]
    path = folder / one_of(draw, "triplets.csv", "triplets.pytorch")
    if path.suffix == ".csv":
        path.write_bytes(changed_csv(draw, [["subject", "object", "predicate"]] * draw.ConsumeBool() + rows))
    else:
        save_tensors(draw, path, torch.tensor([[int(cell) for cell in row] for row in rows]))
    found = read_zero_shot_triplets(path)
    assert found.dtype == torch.int64 and found.shape[1:] == (3,) and (found >= 1).all()
    if path.suffix == ".csv":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        cells = [[cell.strip().strip('"') for cell in line.split(",")] for line in lines]
        numbers = [[int(cell) for cell in row] for row in cells if any(map(str.isdecimal, "".join(row)))]
        assert found[:, [0, 2, 1]].tolist() == numbers
    else:
        stored = torch.load(path, weights_only=True)
        assert stored.dtype != torch.bool and stored.long()[:, [0, 2, 1]].equal(found)


def class_names(draw: Draw, folder: Path) -> None:
    forms: list[Any] = [
        ["person", "horse", "background"], [BACKGROUND, "person"], {"1": "person", "2": "horse", "10": "x"},
        [{"id": 1, "name": "person"}, {"id": 3, "name": "horse"}], {"b": "person", "0": "none"},
    ]  # fmt: skip
    write_json(draw, path := folder / "objects.json", one_of(draw, *forms))
    content = read_json(path)
    if not isinstance(content, list | dict):
        return
    entries = list(content.items() if isinstance(content, dict) else enumerate(content))
    classes = read_classes(str(path), entries, has_background=draw.ConsumeBool())
    assert classes.names[0] == BACKGROUND and len(classes.names) >= 2 and len(set(classes.names)) == len(classes.names)
    assert sorted(classes.numbers.values())[-1] == len(classes.names) - 1
    for class_id, entry in entries:
        name = entry["name"] if isinstance(entry, dict) else entry
        class_id = entry.get("id", class_id) if isinstance(entry, dict) else class_id
        number = classes.numbers[class_id if isinstance(class_id, str) else str(int(class_id))]
        assert number == 0 or classes.names[number] == name


@functools.cache
def image_files() -> list[tuple[str, bytes]]:
    colors = Image.effect_noise((21, 13), 80).convert("RGB")
    numbers = np.arange(21 * 13, dtype=np.uint16).reshape(13, 21) * 200
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha, palette, gray = colors.convert("RGBA"), colors.convert("P"), colors.convert("L")
    wide, floats = Image.fromarray(numbers), Image.fromarray(numbers.astype(np.float32))
    saved: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("PNG", colors, {}), ("PNG", palette, {"transparency": 3}), ("PNG", wide, {}), ("PNG", alpha, {"exif": exif}),
        ("JPEG", colors, {"exif": exif}), ("JPEG", gray, {"progressive": True}), ("JPEG", colors.convert("CMYK"), {}),
        ("WEBP", alpha, {"lossless": True}), ("WEBP", colors, {"exif": exif}), ("GIF", palette, {}),
        ("GIF", palette, {"save_all": True, "append_images": [palette.rotate(90)]}),
        ("TIFF", wide, {}), ("TIFF", floats, {}), ("TIFF", colors, {"compression": "tiff_lzw", "exif": exif}),
        ("TIFF", gray.convert("1"), {"compression": "group4"}), ("BMP", palette, {}), ("ICO", alpha, {}),
        ("PPM", gray, {}), ("TGA", alpha, {}), ("PCX", palette, {}), ("JPEG2000", colors, {}), ("DDS", alpha, {}),
        ("SGI", colors, {}), ("ICNS", alpha.resize((16, 16)), {}), ("MPO", colors, {"exif": exif}),
    ]  # fmt: skip
    files = []
    for kind, image, options in saved:
        image.save(data := io.BytesIO(), kind, **options)
        files.append((kind.lower(), data.getvalue()))
    return files


def _png(draw: Draw, content: bytes) -> bytes:
    """Return a PNG file in which a chunk has changed bytes and a checksum that fits."""
    chunks, place = [], 8
    while place < len(content):
        length = struct.unpack(">I", content[place : place + 4])[0]
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += length + 12
    number = draw.ConsumeIntInRange(0, len(chunks) - 1)
    chunks[number] = chunks[number][0], changed_bytes(draw, chunks[number][1], 3)
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return content[:8] + b"".join(parts)


def images(draw: Draw, folder: Path) -> None:
    kind, content = one_of(draw, *image_files())
    action = draw.ConsumeIntInRange(0, 19)
    if kind == "png" and action < 12:
        content = _png(draw, content)
    elif action:
        content = changed_bytes(draw, content, 4)
    else:
        content = draw.ConsumeBytes(1000)
    path = folder / one_of(draw, f"image.{kind}", "image")
    path.write_bytes(content)
    is_image(path)
    stored, turned = image_sizes(path)
    image = load_image(path, (48, 64) if draw.ConsumeBool() else None)
    assert image.mode == "RGB" and len(image.tobytes()) == 3 * image.width * image.height
    if kind not in ("icns", "ico"):  # their sizes are known only after loading
        assert image.size in (stored, turned), (image.size, stored, turned)


# ---- models


@functools.cache
def motifs() -> dict[str, Any]:
    return checkpoint_of(MotifsModule(protocol="predcls", vision="none", **SIZES), torch.ones(3, 3, 3))


@functools.cache
def sgtr() -> dict[str, Any]:
    sizes = {"dim": 8, "heads": 2, "ffn_dim": 8, "entity_layers": 1, "entity_queries": 3, "encoder_layers": 1}
    return checkpoint_of(SGTRModule(backbone="resnet10", **sizes, layers=1, queries=2), torch.ones(3, 3, 3))


@functools.cache
def detr() -> dict[str, Any]:
    sizes: dict[str, Any] = {"dim": 8, "heads": 2, "ffn_dim": 8, "entity_layers": 1, "entity_queries": 3}
    return checkpoint_of(EntityDetectorModule(backbone="resnet10", **sizes), torch.ones(3))


def checkpoint_of(module: Any, counts: torch.Tensor) -> dict[str, Any]:
    """Return a checkpoint of a module whose network is made with seed 0. Its large tensors store a single number."""
    torch.manual_seed(0)
    module._set_classes(OBJECTS, PREDICATES, "the data")
    module.make_network(counts)
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    checkpoint["sgalign"]["random_states"] = [torch.zeros(3, dtype=torch.uint8)]
    state = {"monitor": "val/mR@50", "best_model_score": torch.tensor(0.5)}
    for name, tensor in checkpoint["state_dict"].items():
        if tensor.numel() > 10_000:
            checkpoint["state_dict"][name] = tensor.new_zeros(1).expand(tensor.shape)
    return checkpoint | {"global_step": 5, "epoch": 1, "callbacks": {"x": state}}


def check_module(path: Path) -> None:
    module = load_module(path)
    assert module.object_names and module.predicate_names and not module.training
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values() if tensor.is_floating_point())
    model_card({"state_dict": {}, "hyper_parameters": dict(module.hparams)} | module.origin
               | {"sgalign": {"module": type(module).__name__, "object_names": module.object_names,
                              "predicate_names": module.predicate_names}}, "x")  # fmt: skip


def checkpoints(draw: Draw, folder: Path) -> None:
    save_tensors(draw, path := folder / "last.ckpt", motifs())
    latest_checkpoint(folder)
    check_module(path)


def with_changed_config(draw: Draw, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the checkpoint. For a fifth of the inputs, change DETR's config."""
    if draw.ConsumeIntInRange(0, 4) < 4:
        return checkpoint
    detector = checkpoint["sgalign"]["detector"]
    config = json.dumps(changed_json(draw, json.loads(detector["config"]), 2))
    return checkpoint | {"sgalign": checkpoint["sgalign"] | {"detector": detector | {"config": config}}}


def sgtr_checkpoints(draw: Draw, folder: Path) -> None:
    save_tensors(draw, path := folder / "last.ckpt", with_changed_config(draw, sgtr()))
    check_module(path)


@functools.cache
def faster_rcnn() -> Detector:
    return Detector(3, backbone="resnet18", head_dim=4)


def detector_weights(draw: Draw, folder: Path) -> None:
    detector = faster_rcnn()
    for parameter in detector.parameters():  # an earlier input may have changed them
        parameter.data.fill_(1)
    state = {name: tensor.new_zeros(1).expand(tensor.shape) for name, tensor in detector.state_dict().items()}
    inside: dict[str, Any] = {"state_dict": {f"network.{name}": tensor for name, tensor in state.items()}}
    inside["sgalign"] = {"object_names": [BACKGROUND, "horse", "cow"]}
    content = one_of(draw, state, inside, {"state_dict": state})
    save_tensors(draw, path := folder / "detector.pth", content)
    new = load_detector(detector, str(path), OBJECTS)
    assert set(new) <= {"person", "horse"}
    assert all(tensor.isfinite().all() for tensor in detector.state_dict().values() if tensor.is_floating_point())


def detr_weights(draw: Draw, folder: Path) -> None:
    save_tensors(draw, path := folder / "detr.ckpt", with_changed_config(draw, detr()))
    module = SGTRModule(backbone="resnet10", dim=8, heads=2, ffn_dim=8, entity_layers=1, entity_queries=3,
                        encoder_layers=1, layers=1, queries=2, detector_weights=str(path))  # fmt: skip
    module._set_classes([BACKGROUND, "person", "cow"], PREDICATES, "the data")
    detector = make_detector(module.options, 2, module.object_names, {})
    assert all(tensor.isfinite().all() for tensor in detector.state_dict().values() if tensor.is_floating_point())


@functools.cache
def small_data() -> SceneGraphData:
    """Return data of two batches."""
    data = SceneGraphData(batch_size=2)
    data.train, data.validation = data.train[:4], data.validation[:1]
    return data


def small_run(folder: Path, steps: int, *callbacks: Callback) -> tuple[pl.Trainer, MotifsModule]:
    """Return a trainer and a new Motifs model. The trainer keeps checkpoints in `folder`."""
    module = MotifsModule(protocol="predcls", vision="none", **SIZES, optimizer="sgd", warmup_steps=5)
    best = ModelCheckpoint(folder, monitor="val/mR@50", mode="max", save_last=True)
    stop = EarlyStopping("val/mR@50", mode="max", patience=5, strict=False)
    options: Any = {"max_epochs": -1, "max_steps": steps, "enable_checkpointing": True}
    return trainer_without_sanity_check(callbacks=[best, stop, *callbacks], **options), module


@functools.cache
def interrupted() -> list[tuple[str, dict[str, Any]]]:
    """Return checkpoints that a run has written after an epoch and in the next one, each with the run's folder."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        trainer, module = small_run(Path(folder), 3)
        torch.manual_seed(0)
        trainer.fit(module, small_data())
        trainer.save_checkpoint(path := Path(folder) / "within.ckpt")
        return [(folder, torch.load(one, weights_only=True)) for one in (Path(folder) / "last.ckpt", path)]


class Loaded(Callback):
    """A callback that compares the states of a resumed run with those in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compared = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.compared:
            return
        self.compared = True
        stored = torch.load(self.path, weights_only=True)
        assert trainer.global_step == stored["global_step"]
        assert all(tensor.equal(stored["state_dict"][name]) for name, tensor in pl_module.state_dict().items())
        (own,), (saved,) = (one.state_dict() for one in trainer.optimizers), stored["optimizer_states"]
        assert own["state"].keys() == saved["state"].keys()
        for number, state in own["state"].items():
            for name, value in state.items():
                assert value.equal(saved["state"][number][name].to(value.dtype))
        for group, its in zip(own["param_groups"], saved["param_groups"], strict=True):
            assert group["lr"] == its["lr"] or group["initial_lr"] != its["initial_lr"]
        for config, schedule in zip(trainer.lr_scheduler_configs, stored["lr_schedulers"], strict=True):
            assert config.scheduler.last_epoch == schedule["last_epoch"]


def moved(value: Any, old: str, new: str) -> Any:
    """Return nested dicts with another path in their texts."""
    if isinstance(value, dict):
        return {moved(name, old, new): moved(part, old, new) for name, part in value.items()}
    return value.replace(old, new) if isinstance(value, str) else value


def resumed_runs(draw: Draw, folder: Path) -> None:
    runs, path, mine = folder / "runs", folder / "changed.ckpt", folder / "mine.ckpt"
    mine.touch()
    runs.mkdir()
    old, checkpoint = one_of(draw, *interrupted())
    save_tensors(draw, path, checkpoint | {"callbacks": moved(checkpoint["callbacks"], old, str(runs))})
    trainer, module = small_run(runs, 4, Loaded(path))
    try:
        read = read_checkpoint(path)  # the command line reads the file before Lightning does
        check_resumable(read)
        module.on_load_checkpoint(read)
        trainer.fit(module, small_data(), ckpt_path=path)
    except Exception as error:
        sentence = _sentence(error) or ""
        if re.search("ckpt_path|checkpoint|must be finite|classes of the model", sentence):
            raise InputError(f"{folder}: {sentence}") from error
        raise
    finally:
        assert mine.is_file()


def start_from(draw: Draw, folder: Path) -> None:
    save_tensors(draw, path := folder / "other.ckpt", motifs())
    module = MotifsModule(protocol="predcls", vision="none", **SIZES, start_from=str(path))
    checkpoint = read_start(module)
    assert checkpoint is not None
    module._set_classes([BACKGROUND, "person", "cow"], PREDICATES, "the data")
    module.make_network(torch.ones(3, 3, 3))
    with torch.no_grad():
        start(module, checkpoint, str(path), module.class_rows)


@functools.cache
def exported() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    checkpoint = motifs()
    model = {name: checkpoint["sgalign"][name] for name in ("module", "object_names", "predicate_names")}
    config = {"library_name": "sgalign", "format": 1, "sgalign_version": "0.1.0", "step": 5}
    config |= {"options": checkpoint["hyper_parameters"], "model": model}
    return config | {"training": {"epoch": 1, "data": {"root": "x"}, "best": {"val/mR@50": 0.5}}}, checkpoint[
        "state_dict"
    ]


def model_folders(draw: Draw, folder: Path) -> None:
    config, weights = exported()
    write_json(draw, folder / "config.json", config)
    tensors = changed_tensors(draw, weights) if draw.ConsumeIntInRange(0, 3) == 3 else weights
    kept = tensors.items() if isinstance(tensors, dict) else ()
    dense = {
        name.encode("utf-8", "replace").decode(): tensor.contiguous().clone()  # safetensors refuses shared memory
        for name, tensor in kept
        if type(tensor) is torch.Tensor
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
    }
    content = safetensors(dense)
    if draw.ConsumeIntInRange(0, 9) == 9:
        content = changed_bytes(draw, content)
    (folder / "model.safetensors").write_bytes(content)
    is_pretrained(folder)
    check_module(folder)


@functools.cache
def published() -> dict[str, torch.Tensor]:
    from test_sgtr import published_state

    return published_state(16, 24, 1, 1)


def published_sgtr(draw: Draw, folder: Path) -> None:
    state = published()
    save_tensors(draw, path := folder / "sgtr.pth", {"model": state} if draw.ConsumeBool() else state)
    detector, network = load_published(path, focal=draw.ConsumeBool())
    assert network.num_objects and detector


# ---- studies


def studies(draw: Draw, folder: Path) -> None:
    (folder / "c.yaml").write_text("model: {}\n")
    arm = {"name": "p {mask_ratio}", "set": {"data.root": "x"}, "grid": {"model.init_args.mask_ratio": [0.1, 0.5]}}
    content = {"title": "T", "config": "c.yaml", "seeds": 2, "choose": "val/mR@50", "set": {"trainer.max_epochs": 3}}
    content |= {"arms": [{"name": "base", "config": "c.yaml"}, arm | {"base": "base"}]}
    try:
        text = yaml.safe_dump(changed_json(draw, content), sort_keys=False)
    except RecursionError:
        return
    odd = ["!!python/object/apply:os.system [x]", "&a [*a]", "*a", "<<: 1", "2001-01-01", "!!binary x", "? [1]", "---",
           "1: 2", "!!timestamp x", "!!set {a}", ".inf", "0o7", "1:60", "!!int x", "\t", "&a {x: *a}"]  # fmt: skip
    for _ in range(draw.ConsumeIntInRange(0, 2)):
        lines = text.split("\n")
        place = draw.ConsumeIntInRange(0, len(lines) - 1)
        key = lines[place].partition(":")[0] if draw.ConsumeBool() else ""
        lines[place] = f"{key}: {one_of(draw, *odd)}" if key else one_of(draw, *odd)
        text = "\n".join(lines)
    write_text(draw, path := folder / "s.yaml", text)
    study = read_study(path, {"data.root": "VG"} if draw.ConsumeBool() else None)
    names = [arm.name for arm in study.arms]
    assert names and len(set(names)) == len(names) and study.seeds >= 1 and study.choose.startswith("val/")
    assert all(arm.base in ("", *names) and all(isinstance(a, str) for a in arm.arguments) for arm in study.arms)
    assert not re.search(r"[|<>\n]", "".join([study.title, *names]))


RESULT: Result = {
    "seed": 0,
    "settings": {"model": {"class_path": "x.MotifsModule"},
                 "trainer": {"max_epochs": 1, "max_steps": 5}, "data": {"init_args": {"batch_size": 2}}},
    "curve": [{"epoch": 1, "step": 5, "mR@50": 0.25}],
    "epoch": 1,
    "test": {"R@50": 0.5, "mR@50": 0.25, "R@50/on": 0.5},
    "groups": {"head": ["on"], "tail": ["above"]},
    "images": ["a.jpg"],
    "predicates": [[1, 2]],
    "ranks": [[0, 100]],
    "cost": {"device": "cpu", "parameters": 5, "step": 0.5, "training": 1.0, "test": 0.5, "memory": 1000},
}  # fmt: skip


def results(draw: Draw, folder: Path) -> None:
    result: Any = changed_json(draw, RESULT, 2)
    settings, seed = (result.get(key) if isinstance(result, dict) else None for key in ("settings", "seed"))
    run = run_folder(folder, settings, seed)
    try:
        run.mkdir(parents=True)
    except (OSError, ValueError):  # a seed that no folder can have in its name
        return
    if isinstance(result, dict):
        result["digest"] = digest(result)
    write_text(draw, run / "result.json", json.dumps(result))
    (folder / "studies").mkdir()
    arms = [{"name": "base", "base": "", "runs": [run.name]}, {"name": "other", "base": "base", "runs": [run.name]}]
    write_json(draw, folder / "studies" / "s.json", {"title": "T", "choose": "val/mR@50", "arms": arms})
    found = read_result(run)
    assert found is not None
    study = report._read(folder, "s")
    if study.arms:
        tables = report.tables
        tables.of_arms(study.arms, study.choose)
        intervals = tables.differences(study.bases, study.arms)
        tables.of_differences(study.bases, study.arms, intervals)
        tables.of_costs(study.bases, study.arms)
        tables.write_csv(folder / "results.csv", {"s": study.arms})


def held_claims(draw: Draw, folder: Path) -> None:
    own = claims._self()
    for number in range(draw.ConsumeIntInRange(0, 3)):
        name = one_of(draw, f"claim.{number}", "claim.x", "claim.9", f"claim.{draw.ConsumeInt(4)}")
        write_json(draw, folder / name, one_of(draw, own, own | {"pid": "1"}, own | {"machine": "x"}))
    holder = claims.holder(folder)
    claim = claims.take(folder)
    assert (claim is None) == (holder is not None), holder
    if claim is not None:
        claim.release()


def figures(draw: Draw, folder: Path) -> None:
    if draw.ConsumeBool():
        write_json(draw, path := folder / "figures.json", {"R@50": 0.5, "mR@50": 0.25})
    else:
        write_text(
            draw,
            path := folder / "metrics.csv",
            one_of(draw, "epoch,test/R@50,test/x\n0,0.5,\n1,,2e-1\n", "test/a,test/a\n1,2"),
        )
    read = read_results(path)
    assert read and all(type(value) is float and abs(value) < float("inf") for value in read.values())


# ---- continued predictions

MADE_FROM = {"model": "m", "detections": None, "shard": "1/1"}
MODULE: Any = SimpleNamespace(object_names=OBJECTS, predicate_names=PREDICATES)
OPTIONS = {"top_k": 5, "threshold": 0.0, "all_predicates": False}


def predicted(name: str, folder: Path) -> PredictedImage:
    fields = {name: torch.tensor(values) for name, values in FORMS["own"].items()}
    return PredictedImage(ImageFile(folder / name, name), 64, 48, fields | {"image_id": name})


def continued_lines(draw: Draw, folder: Path) -> None:
    path = folder / "graphs.jsonl"
    (folder / "a.jpg").write_bytes(b"image")
    graph = {"image_id": "a.jpg", "file": "x/a.jpg", "bytes": 5, "width": 64, "height": 48} | FORMS["described"]
    lines = [json.dumps(changed_json(draw, graph, 2)) for _ in range(2)]
    write_text(draw, path, "\n".join(lines) + one_of(draw, "\n", "", '\n{"image_'))
    write_json(draw, options_of(path), MADE_FROM | OPTIONS)
    before = path.read_bytes()
    output = GraphLines(path, MODULE, MADE_FROM, **OPTIONS)
    try:
        output.check_files([ImageFile(folder / "a.jpg", "a.jpg")])
        assert all(isinstance(name, str) for name in output.done)
        output.write(predicted("new.jpg", folder))
    finally:
        output.close()
    kept, _, _ = before.rpartition(b"\n")
    after = path.read_bytes()
    assert after.startswith(kept) and json.loads(after[len(kept) :].strip().split(b"\n")[-1])["image_id"] == "new.jpg"


def continued_parts(draw: Draw, folder: Path) -> None:
    path = folder / "scores.h5"
    parts_folder(path).mkdir()
    arrays = {f"d/b.jpg/{name}": np.array(values) for name, values in FORMS["own"].items()}
    for place in ([path] if draw.ConsumeBool() else []) + [parts_folder(path) / "000001.h5"]:
        write_hdf5(draw, place, arrays, {}, most=2)
        arrays = {name.replace("d/b", "a"): array for name, array in arrays.items()}
    write_json(draw, options_of(path), MADE_FROM)
    output = PredictionParts(path, MADE_FROM)
    try:
        done = set(output.done)
        output.write(predicted("new.jpg", folder))
        output.finish()
    finally:
        output.close()
        output._lock.close()
    assert set(prediction_ids(path)) == done | {"new.jpg"}


@functools.cache
def watched() -> list[str]:
    """Return a list to which Python adds the names of events that code in a pickle would cause."""
    dangerous = "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event in dangerous else None)
    return events


def tensors(draw: Draw, folder: Path) -> None:
    """Read changed pickles, in which a command may stand. The command must not run."""
    torch.save({"a": torch.ones(2)}, data := io.BytesIO())
    path, command = folder / "file.ckpt", b"cposix\nsystem\n(X\x04\x00\x00\x00truetR0"
    with zipfile.ZipFile(data) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".pkl"):
                content = content[:2] + one_of(draw, b"", command) + content[2:]  # behind the protocol's number
            changed.writestr(name, changed_bytes(draw, content, 4) if draw.ConsumeBool() else content)
    watched().clear()
    try:
        read_tensors(path, "checkpoint")
    finally:
        assert not watched(), f"reading caused {watched()}"


TARGETS: dict[str, Callable[[Draw, Path], str | None]] = {
    target.__name__: target
    for target in (
        *(detections, predictions_json, predictions_hdf5, eval_results, image_ids, graph_lines, features, word_vectors),
        *(zero_shot_triplets, class_names, images, tensors, checkpoints, sgtr_checkpoints, detector_weights),
        *(detr_weights, resumed_runs, start_from, model_folders, published_sgtr, studies, results),
        *(held_claims, figures, continued_lines, continued_parts),
    )
}

if __name__ == "__main__":
    main(TARGETS)
