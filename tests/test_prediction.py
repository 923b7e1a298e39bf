"""Tests of `sgalign predict` on image files: what it finds, writes, continues and refuses."""

import dataclasses
import fcntl
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import h5py
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchvision")
pytest.importorskip("lightning")
from PIL import Image  # noqa: E402
from trainers import SMALL_MOTIFS, SMALL_SGTR, scenes  # noqa: E402

from sgalign.commands import main as cli  # noqa: E402
from sgalign.data import workers  # noqa: E402
from sgalign.data.predictions import PredictionFile, prediction_ids  # noqa: E402
from sgalign.data.scenes import OBJECT_NAMES, PREDICATE_NAMES  # noqa: E402
from sgalign.prediction import FailedImage, ImageFile, find_images, outputs, predict_images, running  # noqa: E402
from sgalign.prediction.image_paths import Shard  # noqa: E402
from sgalign.training import MotifsModule, SGTRModule, load_module  # noqa: E402
from sgalign.viewing import describe  # noqa: E402

IMAGES = 6


def save_checkpoint(module, path):
    """Write the checkpoint of an untrained module for the classes of the generated scenes."""
    module._set_classes(OBJECT_NAMES, PREDICATE_NAMES, "the test")
    module.make_network(torch.ones(len(OBJECT_NAMES), len(OBJECT_NAMES), len(PREDICATE_NAMES)))
    for weights in module.parameters():
        if weights.dim() == 2:
            weights.data *= 3  # otherwise all queries of SGTR would find the same object
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of a model that finds the objects itself, and of one that does not."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    save_checkpoint(SGTRModule(**SMALL_SGTR, protocol="sgdet"), folder / "sgdet.ckpt")
    save_checkpoint(MotifsModule(**SMALL_MOTIFS), folder / "predcls.ckpt")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six images."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, graph in enumerate(scenes("validation", 40, 0)[:IMAGES]):
        graph.image().save(folder / f"{number}.jpg")
    return folder


@pytest.fixture
def photographs(pictures, tmp_path):
    """A folder with links to six images, an unreadable image and another file."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in pictures.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "notes.txt").write_text("not an image")
    (folder / "torn.png").write_bytes(b"\x89PNG torn")
    return folder


@pytest.fixture
def command(checkpoints, photographs, tmp_path):
    """The command that predicts the photographs in this process."""
    out = tmp_path / "g.jsonl"
    return ["predict", str(photographs), "--checkpoint", str(checkpoints / "sgdet.ckpt"), "--out", str(out), *WORKERS]


WORKERS = ["--workers", "0"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path):
    return [graph["image_id"] for graph in lines(path)]


NAMES = [f"{number}.jpg" for number in range(IMAGES)]


# ---- what it writes


def test_predict_writes_a_line_per_image_and_lists_unreadable_images(command, photographs, tmp_path, capsys):
    assert cli.main([*command, "--top-k", "5"]) == 1
    error = capsys.readouterr().err
    assert "torn.png: must be an image" in error and "skipped 1 entry that is not an image: notes.txt\n" in error
    assert ids(tmp_path / "g.jsonl") == NAMES
    for graph in lines(tmp_path / "g.jsonl"):
        assert Image.open(graph["file"]).size == (graph["width"], graph["height"])
        assert len(graph["triplets"]) <= 5 and graph["objects"][0].keys() == {"label", "box", "score"}
    (failed,) = lines(tmp_path / "g.failed.jsonl")
    assert failed["image_id"] == "torn.png" and "must be an image" in failed["reason"]
    (photographs / "torn.png").unlink()
    assert cli.main([*command, "--top-k", "5"]) == 0
    assert not (tmp_path / "g.failed.jsonl").exists()


def test_worker_processes_and_a_python_loop_give_the_same_graphs(command, checkpoints, photographs, tmp_path):
    cli.main(command)
    one = (tmp_path / "g.jsonl").read_bytes()
    cli.main([*command, "--overwrite", "--workers", "2"])
    assert (tmp_path / "g.jsonl").read_bytes() == one
    module = load_module(checkpoints / "sgdet.ckpt")
    results = list(predict_images(module, find_images([photographs])[0]))
    assert isinstance(results.pop(), FailedImage)
    for result, graph in zip(results, lines(tmp_path / "g.jsonl"), strict=True):
        described = describe(result.prediction, module.object_names, module.predicate_names, 20)
        assert (graph["objects"], graph["triplets"]) == (described["objects"], described["triplets"])


def no_shared_memory(tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_worker_that_gets_no_shared_memory_ends_the_command_with_one_sentence(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_shared_memory)  # in the workers, which are forked
    assert cli.main([*command, "--workers", "2"]) == 1
    assert multiprocessing.active_children() == []
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("sgalign: a worker process cannot pass its batch on through shared memory: unable")
    assert last.endswith("use fewer workers, or none")
    monkeypatch.undo()
    assert cli.main([*command, "--workers", "2"]) == 1  # one of the photographs cannot be read
    assert len(lines(tmp_path / "g.jsonl")) == IMAGES


def test_workers_share_all_tensors_of_their_batches(monkeypatch):
    monkeypatch.setattr(workers, "get_worker_info", lambda: "one")
    batch = {"a": [(torch.ones(1), "text")], "b": None, "c": torch.ones(2)}
    assert workers.collate_and_share(lambda items: items, batch) is batch
    assert batch["a"][0][0].is_shared() and batch["c"].is_shared()
    monkeypatch.setattr(workers, "get_worker_info", lambda: None)
    assert not workers.collate_and_share(lambda items: items[0], [torch.ones(1)]).is_shared()


def test_images_of_one_size_do_not_change_each_other_in_a_batch(checkpoints, pictures):
    module = load_module(checkpoints / "sgdet.ckpt")
    files = [
        ImageFile(file.path, f"{turn} {file.image_id}") for file in find_images([pictures])[0] for turn in range(2)
    ]
    for one, other in zip(predict_images(module, files), predict_images(module, files, batch_size=2), strict=True):
        assert one.file == other.file
        torch.testing.assert_close(one.prediction["boxes"], other.prediction["boxes"], atol=1e-2, rtol=1e-3)


def test_with_padding_to_one_size_no_image_changes_another(pictures):
    torch.manual_seed(0)
    module = SGTRModule(**SMALL_SGTR, protocol="sgdet", padded_size=[96, 96])  # 96 is the long side
    module._set_classes(OBJECT_NAMES, PREDICATE_NAMES, "the test")
    module.make_network(torch.ones(len(OBJECT_NAMES), len(OBJECT_NAMES), len(PREDICATE_NAMES)))
    files = find_images([pictures])[0]
    assert len({Image.open(file.path).size for file in files}) > 1
    alone, together = (list(predict_images(module.eval(), files, batch_size=size)) for size in (1, IMAGES))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.prediction["boxes"], other.prediction["boxes"], atol=1e-2, rtol=1e-3)
    module.options = dataclasses.replace(module.options, padded_size=(0, 0))
    without = [result.prediction["boxes"] for result in predict_images(module, files)]
    assert any((one.prediction["boxes"] - boxes).abs().max() > 0.1 for one, boxes in zip(alone, without, strict=True))


@pytest.mark.parametrize("batch_size, what", [(1, "this image"), (2, "this batch of 2 images")])
def test_images_that_need_too_much_memory_do_not_stop_the_others(checkpoints, pictures, monkeypatch, batch_size, what):
    module = load_module(checkpoints / "sgdet.ckpt")
    files, batches, predictions = find_images([pictures])[0], [], module.predictions

    def limited(batch):
        batches.append(batch)
        if len(batches) == 1:
            raise torch.OutOfMemoryError
        return predictions(batch)

    monkeypatch.setattr(module, "predictions", limited)
    results = list(predict_images(module, files, batch_size=batch_size))
    assert [result.file for result in results] == files
    assert [result.reason for result in results if isinstance(result, FailedImage)] == [
        f"{file.path}: the GPU has too little free memory for {what}" for file in files[:batch_size]
    ]


def test_a_threshold_leaves_out_lower_triplets_of_the_lines_only(command, tmp_path):
    cli.main([*command, "--hdf5", str(tmp_path / "p.h5")])
    scores = sorted(triplet["score"] for graph in lines(tmp_path / "g.jsonl") for triplet in graph["triplets"])
    middle = scores[len(scores) // 2]
    cli.main(
        [*command, "--hdf5", str(tmp_path / "q.h5"), "--threshold", str(middle), "--out", str(tmp_path / "t.jsonl")]
    )
    left = [triplet["score"] for graph in lines(tmp_path / "t.jsonl") for triplet in graph["triplets"]]
    assert len(left) < len(scores) and min(left) >= middle - 1e-6
    assert_same_predictions(tmp_path / "p.h5", tmp_path / "q.h5")


def test_a_threshold_that_no_triplet_reaches_is_named(command, tmp_path, capsys):
    cli.main([*command, "--threshold", "1"])
    assert not any(graph["triplets"] for graph in lines(tmp_path / "g.jsonl"))
    assert "sgalign: no triplet has a score of at least --threshold 1.0\n" in capsys.readouterr().err


def assert_same_predictions(path, other):
    with h5py.File(path) as a, h5py.File(other) as b:
        assert sorted(a) == sorted(b) == NAMES
        for name in NAMES:
            assert a[name].keys() == b[name].keys() >= {"boxes", "triplets", "triplet_scores"}
            assert all((a[name][field][()] == b[name][field][()]).all() for field in a[name])


def test_a_model_for_given_boxes_reads_the_detections(checkpoints, photographs, tmp_path, capsys):
    command = ["predict", str(photographs), "--checkpoint", str(checkpoints / "predcls.ckpt"), *WORKERS]
    command += ["--out", str(tmp_path / "g.jsonl")]
    assert cli.main(command) == 1
    assert "a model with protocol predcls needs --detections FILE" in capsys.readouterr().err
    found = {
        name: {"boxes_xyxy": [[0, 0, 9, 9], [5, 5, 20, 20]], "labels": [0, 3], "scores": [1, 0.5]} for name in NAMES
    }
    del found["5.jpg"]
    (tmp_path / "d.json").write_text(json.dumps(found))
    assert cli.main([*command, "--detections", str(tmp_path / "d.json")]) == 1
    assert "there is no image '5.jpg' in --detections" in capsys.readouterr().err
    assert ids(tmp_path / "g.jsonl") == NAMES[:5]
    assert [object_["label"] for object_ in lines(tmp_path / "g.jsonl")[0]["objects"]] == ["person", "bird"]


# ---- runs that were stopped


def start(command, tmp_path, images=2000):
    """Start the command on many images, wait until some have a result, and return its process."""
    first = tmp_path / "photographs" / "0.jpg"
    for number in range(images):
        (tmp_path / "photographs" / f"{number:04}.jpg").symlink_to(first)
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sgalign", *command], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "g.jsonl").exists() or (tmp_path / "g.jsonl").read_bytes().count(b"\n") < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_stopped_run_says_how_far_it_came_and_keeps_everything(number, command, tmp_path):
    process = start([*command, "--hdf5", str(tmp_path / "p.h5"), "--workers", "1"], tmp_path)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    done = ids(tmp_path / "g.jsonl")
    assert process.returncode == 128 + number, error
    assert f"stopped after {len(done)} of 2007 images" in error and "Traceback" not in error
    (part,) = (tmp_path / "p.h5.parts").glob("*.h5")
    with h5py.File(part) as file:
        assert done[: len(file)] == sorted(file) and len(done) - len(file) in (0, 1) and len(done) < 2006


def test_ctrl_c_takes_effect_when_the_workers_have_started(command, monkeypatch, capsys):
    begin, started = DataLoader.__iter__, []

    def interrupted(loader):
        signal.raise_signal(signal.SIGINT)
        started.append(begin(loader))
        return started[0]

    monkeypatch.setattr(DataLoader, "__iter__", interrupted)
    assert cli.main([*command, "--workers", "1"]) == 130 and started
    assert "stopped after 0 of" in capsys.readouterr().err


def test_after_a_kill_the_same_command_predicts_only_what_is_missing(command, tmp_path, monkeypatch):
    process = start([*command, "--hdf5", str(tmp_path / "p.h5")], tmp_path, images=200)
    process.kill()
    process.communicate(timeout=60)
    for path in (tmp_path / "photographs").glob("0*.jpg"):
        path.unlink(missing_ok=True)  # 0.jpg and all links to it
    with (tmp_path / "g.jsonl").open("a") as file:
        file.write('{"image_id": "1.jpg", "objects": [{"la')  # as a kill may leave it
    before = (tmp_path / "g.jsonl").read_bytes().rpartition(b"\n")[0]
    assert cli.main([*command, "--hdf5", str(tmp_path / "p.h5")]) == 1  # torn.png
    after = (tmp_path / "g.jsonl").read_bytes()
    assert after.startswith(before + b"\n")
    assert len(set(ids(tmp_path / "g.jsonl"))) == len(ids(tmp_path / "g.jsonl"))
    assert set(NAMES[1:]) <= set(ids(tmp_path / "g.jsonl"))
    with h5py.File(tmp_path / "p.h5") as file:
        assert set(NAMES[1:]) <= set(file)
    assert not (tmp_path / "p.h5.parts").exists()


def test_a_second_run_predicts_new_images_only(command, photographs, pictures, tmp_path, monkeypatch):
    (photographs / "torn.png").unlink()
    (photographs / "5.jpg").unlink()
    command += ["--hdf5", str(tmp_path / "p.h5")]
    assert cli.main(command) == 0
    first = (tmp_path / "g.jsonl").read_bytes()
    (photographs / "5.jpg").symlink_to(pictures / "5.jpg")
    read = []
    monkeypatch.setattr(
        running, "predict_images", lambda module, files, **options: read.append(files) or predict_images(module, files)
    )
    assert cli.main(command) == 0
    assert [file.image_id for file in read[0]] == ["5.jpg"]
    assert (tmp_path / "g.jsonl").read_bytes().startswith(first) and ids(tmp_path / "g.jsonl") == NAMES
    cli.main([*command, "--out", str(tmp_path / "whole.jsonl"), "--hdf5", str(tmp_path / "whole.h5")])
    assert_same_predictions(tmp_path / "p.h5", tmp_path / "whole.h5")


def test_parts_are_closed_after_some_time(command, tmp_path, monkeypatch):
    monkeypatch.setattr(outputs, "PART_SECONDS", 0.0)
    closed = []
    close = outputs.PredictionParts.close
    monkeypatch.setattr(outputs.PredictionParts, "close", lambda self: closed.append(1) or close(self))
    cli.main([*command, "--hdf5", str(tmp_path / "p.h5")])
    assert len(closed) > IMAGES - 1
    with h5py.File(tmp_path / "p.h5") as file:
        assert sorted(file) == NAMES


def test_a_full_disk_leaves_complete_lines(command, tmp_path, capsys, monkeypatch):
    cli.main(command)
    whole = (tmp_path / "g.jsonl").read_bytes()
    monkeypatch.setattr(outputs, "describe", limited(outputs.describe, 3))
    assert cli.main([*command, "--overwrite"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert whole.startswith((tmp_path / "g.jsonl").read_bytes()) and ids(tmp_path / "g.jsonl") == NAMES[:3]
    monkeypatch.undo()
    assert cli.main(command) == 1  # torn.png
    assert (tmp_path / "g.jsonl").read_bytes() == whole


def limited(describe, count):
    """Return `describe`, after `count` calls of which the file cannot grow."""
    calls = []

    def described(*arguments, **options):
        calls.append(1)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return describe(*arguments, **options)

    return described


def test_the_part_of_a_line_that_fit_on_the_disk_is_removed(checkpoints, pictures, tmp_path, monkeypatch):
    module = load_module(checkpoints / "sgdet.ckpt")
    file = outputs.GraphLines(tmp_path / "g.jsonl", module, {}, top_k=3, threshold=0, all_predicates=False)
    first, second = predict_images(module, find_images([pictures])[0][:2])
    file.write(first)
    whole = (tmp_path / "g.jsonl").read_bytes()

    class Full:
        def __init__(self, raw):
            self.raw, self.truncate = raw, raw.truncate

        def write(self, data):
            if len(data) < 100:
                raise OSError(28, "No space left on device")
            return self.raw.write(data[: len(data) // 2])

    file._file = Full(file._file)
    with pytest.raises(OSError, match="No space left on device: .*g.jsonl"):
        file.write(second)
    assert (tmp_path / "g.jsonl").read_bytes() == whole


# ---- what it refuses


@pytest.mark.parametrize(
    "change, message",
    [
        (["--top-k", "3"], "top_k was 20 and is now 3"),
        (["--threshold", "0.5"], "threshold was 0.0 and is now 0.5"),
        (["--all-predicates"], "all_predicates was False and is now True"),
    ],
)
def test_results_of_other_options_are_not_continued(change, message, command, tmp_path, capsys):
    cli.main(command)
    before = (tmp_path / "g.jsonl").read_bytes()
    assert cli.main([*command, *change]) == 1
    assert message in capsys.readouterr().err and (tmp_path / "g.jsonl").read_bytes() == before
    cli.main([*command, *change, "--overwrite"])
    assert (tmp_path / "g.jsonl").read_bytes() != before or change == ["--all-predicates"]  # SGTR ranks by itself


def test_results_of_another_model_are_not_continued(command, checkpoints, tmp_path, capsys):
    cli.main(command)
    torch.manual_seed(1)
    save_checkpoint(SGTRModule(**SMALL_SGTR, protocol="sgdet"), tmp_path / "other.ckpt")
    command[command.index("--checkpoint") + 1] = str(tmp_path / "other.ckpt")
    assert cli.main(command) == 1
    assert "model was " in capsys.readouterr().err


def test_a_file_of_unknown_origin_is_not_continued(command, tmp_path, capsys):
    (tmp_path / "g.jsonl").write_text('{"image_id": "x"}\n')
    assert cli.main(command) == 1
    assert "g.jsonl exists, but not" in capsys.readouterr().err
    assert (tmp_path / "g.jsonl").read_text() == '{"image_id": "x"}\n'


def test_two_runs_cannot_write_the_same_file(command, checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    module = load_module(checkpoints / "sgdet.ckpt")
    file = outputs.GraphLines(tmp_path / "g.jsonl", module, {}, top_k=3, threshold=0, all_predicates=False)
    assert cli.main(command) == 1
    assert "another process is writing this file" in capsys.readouterr().err
    file.close()


def test_a_run_waits_for_the_lock_that_the_workers_of_a_killed_run_still_hold(tmp_path):
    with open(tmp_path / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        end.start()
        outputs._locked(tmp_path / "lock").close()
        end.join()


def test_a_run_that_waited_does_not_lock_a_file_that_was_deleted_meanwhile(tmp_path):
    first = outputs.PredictionParts(tmp_path / "p.h5", {})
    end = threading.Timer(0.5, first.finish)
    end.start()
    second = outputs._locked(tmp_path / "p.h5.parts" / "lock")
    end.join()
    assert os.path.samestat(os.fstat(second.fileno()), (tmp_path / "p.h5.parts" / "lock").stat())
    second.close()


def test_a_run_that_is_refused_does_not_change_what_the_other_one_writes(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(outputs, "LOCK_SECONDS", 0.1)
    parts = outputs.PredictionParts(tmp_path / "p.h5", {"model": "first"})
    options = (tmp_path / "p.h5.options.json").read_bytes()
    for more in ([], ["--overwrite"]):
        assert cli.main([*command, "--hdf5", str(tmp_path / "p.h5"), *more]) == 1
        assert "another process is writing this file" in capsys.readouterr().err
        assert (tmp_path / "p.h5.options.json").read_bytes() == options
    parts.close()


def test_a_damaged_part_is_named(tmp_path, monkeypatch):
    def read_array(values):
        raise RuntimeError("ran off end of input buffer")

    monkeypatch.setattr(outputs, "read_array", read_array)
    with h5py.File(tmp_path / "000001.h5", "w") as part:
        part["a/scores"] = [1.0]
    with h5py.File(tmp_path / "p.h5", "w") as joined:
        with pytest.raises(ValueError, match=r"000001\.h5: is damaged \(ran off .*; delete this file"):
            outputs._add_images(joined, tmp_path / "000001.h5")


def test_a_refused_run_leaves_no_folder_of_parts(command, tmp_path):
    (tmp_path / "p.h5").write_bytes(b"mine")
    assert cli.main([*command, "--hdf5", str(tmp_path / "p.h5")]) == 1
    assert (tmp_path / "p.h5").read_bytes() == b"mine" and not (tmp_path / "p.h5.parts").exists()


def test_a_damaged_line_is_named(command, tmp_path, capsys):
    cli.main(command)
    text = (tmp_path / "g.jsonl").read_text()
    (tmp_path / "g.jsonl").write_text(text.replace('{"image_id": "1.jpg"', "{image", 1))
    assert cli.main(command) == 1
    assert "g.jsonl, line 2: must be the graph of an image in JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--out", "g.json", "--out must end in .jsonl"),
        ("--hdf5", "p.json", "--hdf5 must end in .h5 or .hdf5"),
        ("--top-k", "0", "--top-k must be at least 1"),
        ("--batch-size", "0", "--batch-size must be at least 1"),
        ("--workers", "-1", "--workers must be at least 0"),
        ("--threshold", "nan", "--threshold must be from 0 to 1"),
        ("--shard", "0/2", "must be I/N with I from 1 to N"),
        ("--shard", "3/2", "must be I/N with I from 1 to N"),
        ("--out", "a.failed.jsonl", "--out must not end in .failed.jsonl"),
    ],
)
def test_wrong_options_are_refused(option, value, message, command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, option, value])
    assert message in capsys.readouterr().err


def test_predict_reports_a_missing_checkpoint(photographs, capsys):
    assert cli.main(["predict", str(photographs), "--checkpoint", "none.ckpt"]) == 1
    assert "none.ckpt" in capsys.readouterr().err


def test_predict_needs_a_checkpoint(photographs):
    with pytest.raises(SystemExit):
        cli.main(["predict", str(photographs)])


def test_another_image_of_the_same_name_is_not_taken_for_the_old_one(command, photographs, pictures, tmp_path, capsys):
    cli.main(command)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "0.jpg").write_bytes((pictures / "1.jpg").read_bytes())
    command[1] = str(tmp_path / "others")
    assert cli.main(command) == 1
    assert "has the graph of" in capsys.readouterr().err
    command[1] = str(photographs)
    photographs.rename(tmp_path / "moved")
    command[1] = str(tmp_path / "moved")
    assert cli.main(command) == 1  # torn.png
    assert ids(tmp_path / "g.jsonl") == NAMES
    text = (tmp_path / "g.jsonl").read_text()
    (tmp_path / "g.jsonl").write_text(text.replace(str(photographs), "x" * 300))  # no file can have this name
    assert cli.main(command) == 1  # torn.png
    assert ids(tmp_path / "g.jsonl") == NAMES


def test_an_image_that_has_changed_is_not_taken_for_the_old_one(command, photographs, pictures, tmp_path, capsys):
    cli.main(command)
    (photographs / "0.jpg").unlink()
    (photographs / "0.jpg").write_bytes((pictures / "1.jpg").read_bytes())
    assert cli.main(command) == 1
    assert "but this image now has" in capsys.readouterr().err


def test_what_earlier_runs_have_left_is_said(command, photographs, tmp_path, capsys):
    (photographs / "torn.png").unlink()
    cli.main([*command, "--html"])
    (photographs / "0.jpg").unlink()
    capsys.readouterr()
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "5 of 5 images" in out and "g.jsonl also has 1 image of earlier runs" in out
    assert "g.html comes from an earlier run. --html renews it" in out


def test_an_incomplete_last_line_is_removed_even_if_nothing_is_left_to_predict(command, photographs, tmp_path):
    (photographs / "torn.png").unlink()
    cli.main(command)
    before = (tmp_path / "g.jsonl").read_bytes()
    (tmp_path / "g.jsonl").write_bytes(before + b'{"image_id": "to')
    assert cli.main(command) == 0
    assert (tmp_path / "g.jsonl").read_bytes() == before


def test_the_hdf5_file_of_another_model_is_not_continued(command, tmp_path, capsys):
    cli.main([*command, "--hdf5", str(tmp_path / "p.h5")])
    torch.manual_seed(1)
    save_checkpoint(SGTRModule(**SMALL_SGTR, protocol="sgdet"), tmp_path / "other.ckpt")
    command[command.index("--checkpoint") + 1] = str(tmp_path / "other.ckpt")
    command[command.index("--out") + 1] = str(tmp_path / "other.jsonl")
    assert cli.main([*command, "--hdf5", str(tmp_path / "p.h5")]) == 1
    assert "p.h5 comes from a run with other options (model was" in capsys.readouterr().err


def test_overwriting_does_not_delete_folders_or_results_that_are_being_written(command, checkpoints, tmp_path, capsys):
    (tmp_path / "photos.jsonl").mkdir()
    (tmp_path / "photos.jsonl" / "mine").touch()
    assert cli.main([*command, "--out", str(tmp_path / "photos.jsonl"), "--overwrite"]) == 1
    assert (
        "must be a file, but is a folder" in capsys.readouterr().err and (tmp_path / "photos.jsonl" / "mine").exists()
    )
    cli.main(command)
    before = (tmp_path / "g.jsonl").read_bytes()
    module = load_module(checkpoints / "sgdet.ckpt")
    file = outputs.GraphLines(tmp_path / "g.jsonl", module, {}, top_k=20, threshold=0, all_predicates=False)
    assert cli.main([*command, "--overwrite"]) == 1
    assert (tmp_path / "g.jsonl").read_bytes() == before
    file.close()


def test_a_device_is_no_file_of_results(command, tmp_path, capsys):
    (tmp_path / "full.jsonl").symlink_to("/dev/full")
    assert cli.main([*command, "--out", str(tmp_path / "full.jsonl")]) == 1
    assert "must be a regular file" in capsys.readouterr().err


def test_a_write_that_fails_leaves_no_incomplete_image_in_hdf5(tmp_path, monkeypatch):
    class FailingTensor:
        dtype = torch.float32

        def detach(self):
            return self

        cpu = detach

        def numpy(self):
            raise OSError("no space left")

    monkeypatch.setattr(torch, "as_tensor", lambda value: value)
    good = {"boxes": torch.zeros(1, 4), "labels": torch.ones(1), "scores": torch.ones(1)}
    with PredictionFile(tmp_path / "p.h5") as file:
        file.write("a", good)
        with pytest.raises(OSError, match="no space left"):
            file.write("folder/b", good | {"scores": FailingTensor()})
    assert list(prediction_ids(tmp_path / "p.h5")) == ["a"]


def test_a_bad_image_whose_name_is_not_utf8_does_not_stop_the_run(command, photographs, tmp_path):
    os.rename(os.fsencode(photographs / "torn.png"), os.fsencode(photographs) + b"/torn\xff.png")
    assert cli.main(command) == 1
    assert ids(tmp_path / "g.jsonl") == NAMES and lines(tmp_path / "g.failed.jsonl")[0]["image_id"] == "torn\\xff.png"


# ---- which images


def test_odd_entries_of_a_folder_are_skipped(command, photographs, tmp_path, capsys):
    (photographs / "loop.jpg").symlink_to("loop.jpg")
    (photographs / "folder.jpg").mkdir()
    cli.main(command)
    assert "skipped 3 entries that are not images: folder.jpg, loop.jpg, notes.txt" in capsys.readouterr().err


def test_an_id_must_not_be_the_folder_of_another(tmp_path):
    (tmp_path / "ids" / "a.jpg").mkdir(parents=True)
    for path in (tmp_path / "a.jpg", tmp_path / "ids" / "a.jpg" / "b.jpg"):
        Image.new("RGB", (9, 9)).save(path)
    with pytest.raises(ValueError, match="an id must not extend another one by a slash"):
        find_images([tmp_path / "a.jpg", f"{tmp_path}/ids/*/b.jpg"])


def test_patterns_and_several_paths_name_images(tmp_path):
    for name in ("a/1.jpg", "a/b/2.jpg", "a/b/3.txt", "c/4.png", "c/.hidden.png", "5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, others = find_images([f"{tmp_path}/a/**/*", tmp_path / "c", str(tmp_path / "5.jpg"), tmp_path / "5.jpg"])
    assert [image_id for _, image_id in found] == ["1.jpg", "4.png", "5.jpg", "b/2.jpg"]
    assert all(path.name == Path(image_id).name for path, image_id in found)
    assert [path.name for path in others] == ["3.txt"]


def test_two_images_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / folder / "1.png")
    with pytest.raises(ValueError, match="two images have the id '1.png'"):
        find_images([tmp_path / "a", tmp_path / "b"])
    assert [image_id for _, image_id in find_images([f"{tmp_path}/*/1.png"])[0]] == ["a/1.png", "b/1.png"]


def test_a_file_name_may_contain_the_characters_of_patterns(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "[1].png")
    assert find_images([tmp_path / "[1].png"])[0] == [ImageFile(tmp_path / "[1].png", "[1].png")]


def test_shards_share_the_images_without_overlap(command, tmp_path):
    cli.main(command)
    names = []
    for number in (1, 2):
        cli.main([*command, "--shard", f"{number}/2"])
        names += ids(tmp_path / f"g.{number}-of-2.jsonl")
    assert sorted(names) == NAMES
    files = [ImageFile(Path(name), name) for name in (f"IMG_{number:04}.JPG" for number in range(4000))]
    counts = [sum(Shard(part, 8).has(file) for file in files) for part in range(1, 9)]
    assert sum(counts) == 4000 and min(counts) > 420 and max(counts) < 580


def test_torchrun_gives_each_process_a_part(command, photographs, tmp_path):
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "sgalign",
            *command,
        ],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1 and "exitcode  : 1" in process.stderr  # torn.png
    both = [ids(tmp_path / f"g.{number}-of-2.jsonl") for number in (1, 2)]
    assert sorted(sum(both, [])) == NAMES


# ---- pictures


def test_pictures_are_drawn_once(command, photographs, tmp_path, capsys):
    (photographs / "torn.png").unlink()
    command = [*command, "--draw"]
    assert cli.main(command) == 0
    pictures = sorted((tmp_path / "g.pictures").iterdir())
    assert [path.name for path in pictures] == [f"{name}.png" for name in NAMES]
    times = [path.stat().st_mtime_ns for path in pictures]
    pictures[0].unlink()
    assert cli.main(command) == 0
    assert [path.stat().st_mtime_ns for path in pictures][1:] == times[1:] and pictures[0].exists()
    time.sleep(0.01)
    cli.main([*command, "--overwrite"])
    assert min(path.stat().st_mtime_ns for path in pictures) > max(times)


def test_pictures_are_not_written_into_the_folder_of_the_images(command, photographs):
    (photographs / "torn.png").unlink()
    before = sorted((path.name, path.read_bytes()) for path in photographs.iterdir())
    assert cli.main([*command, "--draw", "--out", f"{photographs}.jsonl"]) == 0
    assert sorted((path.name, path.read_bytes()) for path in photographs.iterdir()) == before
    assert sorted(path.stem for path in Path(f"{photographs}.pictures").iterdir()) == NAMES


def test_a_file_with_the_name_of_the_folder_of_pictures_is_kept(command, tmp_path, capsys):
    (tmp_path / "g.pictures").write_text("mine")
    with pytest.raises(SystemExit):
        cli.main([*command, "--draw"])
    assert "g.pictures, which must not be a file" in capsys.readouterr().err
    assert (tmp_path / "g.pictures").read_text() == "mine"


def test_inputs_are_not_overwritten(command, photographs, tmp_path, capsys):
    detections, folder = tmp_path / "d.failed.jsonl", tmp_path / "x.pictures"
    detections.write_text("{}")
    shutil.copytree(photographs, folder)
    for wrong in (
        [*command, "--detections", str(detections), "--out", str(tmp_path / "d.jsonl")],
        [command[0], str(folder), *command[2:], "--draw", "--out", str(tmp_path / "x.jsonl")],
    ):
        with pytest.raises(SystemExit):
            cli.main(wrong)
        assert "must not be written, because the command reads it" in capsys.readouterr().err
    assert detections.read_text() == "{}"


def test_a_page_shows_all_images_of_the_run(command, tmp_path, capsys):
    cli.main([*command, "--html"])
    assert f"wrote {tmp_path / 'g.html'}: 6 images.\n" in capsys.readouterr().out
    page = (tmp_path / "g.html").read_text()
    assert page.count("data:image/jpeg") == 2 * IMAGES and all(f'"{name}"' in page for name in NAMES)


# ---- memory


def test_the_memory_does_not_grow_with_the_number_of_images(checkpoints, pictures, tmp_path):
    module = load_module(checkpoints / "sgdet.ckpt")
    file = outputs.GraphLines(tmp_path / "g.jsonl", module, {}, top_k=20, threshold=0, all_predicates=False)
    files = [ImageFile(pictures / "0.jpg", f"{number}.jpg") for number in range(120)]
    tracemalloc.start()
    held = []
    for number, result in enumerate(predict_images(module, files)):
        file.write(result)
        if number in (20, 119):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] - held[0] < 99 * 1000, "bytes for 99 images, of which only the ids and paths may stay"


def test_a_line_whose_id_is_no_text_is_not_continued(tmp_path):
    options = {"top_k": 5, "threshold": 0.0, "all_predicates": False}
    (tmp_path / "g.jsonl").write_text('{"image_id": 5}\n')
    (tmp_path / "g.jsonl.options.json").write_text(json.dumps(options))
    with pytest.raises(
        ValueError, match=r"g\.jsonl, line 1: must be the graph of an image in JSON \(image_id is not text"
    ):
        outputs.GraphLines(tmp_path / "g.jsonl", SGTRModule(**SMALL_SGTR), {}, **options)
