"""Tests of files that someone made to fill the memory, to run code, or to reach files outside a folder."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

pytest.importorskip("torchmetrics")
from sgalign.data import OpenImagesDataset, SceneGraph, read_detections  # noqa: E402
from sgalign.data.coco_writing import write_coco  # noqa: E402
from sgalign.data.features import FIELDS, FeatureCache  # noqa: E402
from sgalign.data.graph_lines import read_graph_lines  # noqa: E402
from sgalign.data.image_files import ImageFiles  # noqa: E402
from sgalign.data.images import check_file_name, load_image  # noqa: E402
from sgalign.data.prediction_reading import Annotations, Predictions  # noqa: E402
from sgalign.data.vg150_arrays import read_arrays  # noqa: E402
from sgalign.errors import InputError, shown  # noqa: E402
from sgalign.files import read_json, read_tensors  # noqa: E402
from sgalign.models import Detector  # noqa: E402
from sgalign.models.sgtr_weights import load_published  # noqa: E402
from sgalign.prediction import find_images  # noqa: E402
from sgalign.studies import page, report  # noqa: E402
from sgalign.studies.execute import latest_checkpoint  # noqa: E402
from sgalign.studies.study import read_study  # noqa: E402
from sgalign.training import SGTRModule, load_module  # noqa: E402
from sgalign.training.checkpoints import WholeCheckpointIO  # noqa: E402
from sgalign.training.detr import make_detector  # noqa: E402

MEMORY = 1 << 30  # bytes that a reader may take beyond the imports
SECONDS = 20  # for one file, on a busy machine
NAMES = ["__background__", "person", "horse"]
GRAPHS = [
    SceneGraph(name, 64, 48, torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([1]), torch.tensor([[0, 0, 1]]))
    for name in ("a.jpg", "b.jpg")
]
ANNOTATIONS = Annotations(NAMES, NAMES, GRAPHS, {})


# ---- files that would fill the memory. Another process reads all of them under a limit.


def png(path):
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9999)))]
    data = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(data))


def declared(file, name, shape, dtype="f4"):
    """Add an array whose numbers are not stored."""
    file.create_dataset(name, shape, dtype, chunks=(1024, *shape[1:]), compression="gzip")


def predictions(path):
    with h5py.File(path, "w") as file:
        declared(file, "a.jpg/boxes", (2**30, 4))
        file["a.jpg/labels"] = np.ones(1, "i8")


def listed_predictions(path):
    """Fields whose numbers become lists."""
    with h5py.File(path, "w") as file:
        for name in ("sub_boxes", "obj_boxes", "sub_classes", "obj_classes", "sub_scores", "obj_scores"):
            declared(file, f"a.jpg/{name}", (2**30, 4))


def zeros(path):
    """An array of 512 MiB of zeros, stored in 500 KiB."""
    chunk = 1 << 23
    with h5py.File(path, "w") as file:
        file["a.jpg/labels"] = np.ones(1, "i8")
        array = file.create_dataset("a.jpg/boxes", (8 * chunk, 2), "f4", chunks=(chunk, 2), compression="gzip")
        stored = zlib.compress(bytes(8 * chunk))
        for row in range(0, 8 * chunk, chunk):
            array.id.write_direct_chunk((row, 0), stored)


def linked_groups(path):
    """40 groups, each with two links to the next, which stand for 2^40 ids."""
    with h5py.File(path, "w") as file:
        group = file.create_group("end")
        group.create_group("boxes")
        for number in range(40):
            above = file.create_group(f"g{number}")
            above["a"] = above["b"] = group
            group = above


def features(path):
    path.mkdir()
    with h5py.File(path / "features_0.h5", "w") as file:
        file.attrs.update(weights="x", dtype="float32")
        for field in FIELDS:
            declared(file, f"a.jpg/{field}", (2**30, 4))


def vg150(path):
    with h5py.File(path, "w") as file:
        for name in ("labels", "predicates", "split", "relationships", "boxes_1024"):
            declared(file, name, (2**31, 1), "i4")
        for end in ("first", "last"):
            for what in ("box", "rel"):
                declared(file, f"img_to_{end}_{what}", (2**31,), "i4")


def compressed(path):
    torch.save({"x": torch.zeros(2**24)}, data := io.BytesIO())
    with zipfile.ZipFile(data) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))


def several_disks(path):
    """An archive of `torch.save` that says that it has a second part."""
    torch.save(torch.zeros(1), data := io.BytesIO())
    content = data.getvalue()
    path.write_bytes(content[:-22] + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 2) + content[-22:])


def expanded(path):
    torch.save({"x": torch.zeros(1).expand(2**40)}, path)


def doubled(path):
    """A list whose text would have 2^60 numbers."""
    content = [1]
    for _ in range(60):
        content = [content, content]
    torch.save(content, path)


RESNET = {"backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}


def sgtr(options, **config):
    """A checkpoint with 1000 weights, whose options or DETR may name more."""

    def write(path):
        saved = {"module": "SGTRModule", "object_names": NAMES, "predicate_names": NAMES, "run_seed": 0}
        saved |= {
            "random_states": [torch.zeros(1, dtype=torch.uint8)],
            "detector": {"config": json.dumps(RESNET | config)},
        }
        weights = {f"detector.{number}": torch.zeros(1) for number in range(1000)}
        torch.save({"state_dict": weights, "hyper_parameters": options, "sgalign": saved}, path)

    return write


def gigabyte(path):
    with path.open("wb") as file:
        file.write(b"[1")
        file.truncate(1 << 30)


def yaml(text):
    return lambda path: path.write_text(text)


ALIASES = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))])
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], y{n}: 1}}" for n in range(1, 60))])
HEAD = "title: T\nconfig: c.yaml\nchoose: val/x\narms:\n- name: "
GRID = "grid: {" + ", ".join(f"model.{o}: [{', '.join(map(str, range(99)))}]" for o in "abcdefgh") + "}"

BOMBS = {
    "image.png": (png, load_image, "must be an image that can be read"),
    "predictions.h5": (predictions, lambda path: Predictions(path, ANNOTATIONS)["a.jpg"], "boxes must be numbers"),
    "listed.h5": (listed_predictions, lambda path: Predictions(path, ANNOTATIONS)["a.jpg"], "is damaged"),
    "zeros.h5": (zeros, lambda path: Predictions(path, ANNOTATIONS)["a.jpg"], "boxes must be numbers"),
    "groups.h5": (linked_groups, lambda path: Predictions(path, ANNOTATIONS), "also has another name"),
    "features": (features, lambda path: FeatureCache(path)["a.jpg"], "is damaged"),
    "vg150.h5": (vg150, read_arrays, "the file stores only"),
    "compressed.ckpt": (compressed, lambda path: read_tensors(path, "checkpoint"), "is compressed"),
    "disks.ckpt": (several_disks, lambda path: read_tensors(path, "checkpoint"), "is not one or is cut short"),
    "disks.pt": (several_disks, lambda path: Predictions(path, ANNOTATIONS), "is not one or is cut short"),
    "expanded.ckpt": (expanded, lambda path: read_tensors(path, "checkpoint"), "with fewer stored numbers"),
    "doubled.pt": (doubled, lambda path: Predictions(path, ANNOTATIONS), "must have predictions and groundtruths"),
    "layers.ckpt": (sgtr({"layers": 10**7}), load_module, "must name at most 10000 weights"),
    "depth.ckpt": (sgtr({}, encoder_layers=10**7), load_module, "must name at most 10000 weights"),
    "labels.ckpt": (sgtr({}, num_labels=10**8), load_module, "must have the same weights"),
    "detr.ckpt": (
        sgtr({}, decoder_layers=10**7),
        lambda path: make_detector(SGTRModule(detector_weights=str(path)).options, 2, NAMES, {}),
        "must name at most 10000 weights",
    ),
    "gigabyte.json": (gigabyte, read_json, "too little memory is free|is not JSON"),
    "levels.json": (yaml("[" * 10**6), read_json, "is not JSON"),
    "levels.jsonl": (yaml('{"a":' * 10**6 + "\n"), lambda path: list(read_graph_lines(path)), "is damaged"),
    "digits.json": (yaml("[" + "9" * 100_000 + "]"), lambda path: read_detections(path, NAMES), "is not JSON"),
    "aliases.yaml": (yaml(ALIASES), read_study, "more than 10,000 values"),
    "merges.yaml": (yaml(MERGES), read_study, "merged keys|must have only the keys"),
    "digits.yaml": (yaml(f"seeds: 0x{'f' * 9999}\n{HEAD}x"), read_study, "whole number is larger"),
    "levels.yaml": (yaml("[" * 10_000), read_study, "must be a YAML file"),
    "grid.yaml": (
        yaml(f"{HEAD}'{{a}}{{b}}{{c}}{{d}}{{e}}{{f}}{{g}}{{h}}'\n  {GRID}"),
        read_study,
        "at most 10,000 comb",
    ),
}


def read_bombs(folder):
    """Print the outcome of each file, the seconds and the growth of the process in bytes."""
    for name, (_, read, _) in BOMBS.items():
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = f"loaded {shown(read(folder / name))}"
        except InputError as error:
            outcome = str(error)
        except BaseException as error:  # the other files are read too
            outcome = f"{type(error).__name__}: {error}"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print(json.dumps([name, outcome[:10_000], time.monotonic() - begin, grown]), flush=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bombs")
    (folder / "c.yaml").write_text("")
    for name, (write, _, _) in BOMBS.items():
        write(folder / name)
        assert name == "gigabyte.json" or not (folder / name).is_file() or (folder / name).stat().st_size < 6 << 20
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS * len(BOMBS))
    read = {row[0]: row[1:] for row in map(json.loads, done.stdout.splitlines())}
    assert read.keys() == BOMBS.keys(), done.stderr[-2000:]
    return folder, read


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_do_not_fill_the_memory(name, outcomes):
    folder, read = outcomes
    outcome, seconds, grown = read[name]
    assert str(folder / name) in outcome and len(outcome) < 2000
    assert any(part in outcome for part in BOMBS[name][2].split("|"))
    assert seconds < SECONDS and grown < MEMORY


@pytest.mark.parametrize("kind", ["vg150", "open_images", "features"])
def test_a_pipe_in_a_folder_does_not_wait_for_a_writer(kind, tmp_path):
    name = {"vg150": "VG-SGG.h5", "open_images": "train-annotations-vrd.csv", "features": "features_0.h5"}[kind]
    os.mkfifo(tmp_path / name)
    (tmp_path / "class-descriptions.csv").write_text("/m/1,Man\n")
    read = {
        "vg150": lambda: read_arrays(tmp_path / name),
        "open_images": lambda: OpenImagesDataset(tmp_path, "train"),
        "features": lambda: FeatureCache(tmp_path).images,
    }[kind]
    with pytest.raises(InputError, match=f"{name}: must be a file, but is a pipe or a device"):
        read()


# ---- files that would run code


class Code:
    """An object whose unpickling makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


READERS = {
    "x.ckpt": load_module,
    "last.ckpt": lambda path: latest_checkpoint(path.parent),
    "lightning.ckpt": lambda path: WholeCheckpointIO().load_checkpoint(path),
    "detector.pth": lambda path: Detector(3, backbone="resnet18").load_weights(str(path)),
    "sgtr.pth": load_published,
    "eval_results.pytorch": lambda path: Predictions(path, ANNOTATIONS),
    "model/model.safetensors": lambda path: load_module(path.parent),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_no_code_of_a_file_runs(name, legacy, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({"predictions": Code(tmp_path / "ran")}, path, _use_new_zipfile_serialization=not legacy)
    model = {"module": "MotifsModule", "object_names": NAMES, "predicate_names": NAMES}
    config = {"library_name": "sgalign", "format": 1, "options": {}, "model": model}
    path.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="UnpicklingError|[Ww]eights.only|safetensors"):
        READERS[name](path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [ran]", "!!python/name:os.system", "!!python/tuple [1]"]
)
def test_python_tags_of_a_study_are_refused(tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(f"title: {tag}\n")
    with pytest.raises(InputError, match=r"s\.yaml: must be a YAML file"):
        read_study(tmp_path / "s.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "sgalign.training.pretrained.shutil.rmtree", "sgalign.training.base", 5])
def test_a_report_calls_only_data_of_the_package(name, tmp_path):
    (tmp_path / "kept").mkdir()
    options = {"path": str(tmp_path / "kept")}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": {"class_path": name, "init_args": options}}))
    with pytest.raises(InputError, match=r"config\.yaml: "):
        report._data(tmp_path / "config.yaml")
    assert (tmp_path / "kept").exists()


def test_text_of_a_report_cannot_become_markup(tmp_path):
    (tmp_path / "own.png").write_bytes(b"own")
    (tmp_path.parent / "secret.png").write_bytes(b"secret")
    text = "# <script>x</script>\n\n<script>y</script>\n\n[a](javascript:z) <javascript:z> ![p](own.png)\n"
    page.write_page(
        tmp_path / "page.html", text + "![p](../secret.png) <img src=x onerror=w>\n\n[l]\n\n[l]: javascript:z\n"
    )
    written = (tmp_path / "page.html").read_text()
    assert "<script" not in written and "href" not in written and "onerror=w>" not in written
    assert "default-src 'none'" in written and "b3du" in written and "c2VjcmV0" not in written


@pytest.mark.parametrize("field", ["title", "name", "base", "runs"])
def test_the_record_of_a_study_has_plain_names_and_own_runs(field, tmp_path):
    (tmp_path / "studies").mkdir()
    arm = {"name": "base", "base": "", "runs": ["r"]}
    record = {"title": "T", "choose": "val/x", "arms": [arm]}
    if field == "runs":
        arm["runs"] = ["../../elsewhere"]
    elif field == "base":
        arm["base"] = {}
    else:
        (record if field == "title" else arm)[field] = "<script>x</script>"
    (tmp_path / "studies" / "s.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"s\.json: (names and titles|runs) must be"):
        report._read(tmp_path, "s")


# ---- names of files that lie outside a folder

OUTSIDE = ["../x.jpg", "a/../../x.jpg", "/x.jpg", "//x.jpg", "x\0.jpg", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_image_is_read_or_written_outside_its_folder(name, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    (tmp_path / "images").mkdir()
    assert ImageFiles([tmp_path / "images"]).find(name) is None
    with pytest.raises(InputError, match="must be a path in the data set's folder"):
        check_file_name("file_name", name)


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name.endswith(".jpg")])
def test_no_image_of_a_converted_data_set_is_written_outside_its_folder(name, tmp_path):
    from PIL import Image

    graph = SceneGraph(name, 8, 8, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64),
                       torch.zeros(0, 3, dtype=torch.int64), lambda: Image.new("RGB", (8, 8)))  # fmt: skip
    with pytest.raises(InputError, match="image_id must be a path in the data set's folder"):
        write_coco({"test": [graph]}, NAMES, NAMES, tmp_path / "out", images=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_pattern_gives_no_id_outside_the_folder_of_the_pictures(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path.parent / "x.png").write_bytes(b"")
    with pytest.raises(InputError, match="must not go up after its first special character"):
        find_images([f"{tmp_path}/a*/../../x.png"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_image(tmp_path / "x.png")


if __name__ == "__main__":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    read_bombs(Path(sys.argv[1]))
