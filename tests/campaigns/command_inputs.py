"""The tiny input files of the fuzzing of commands: data sets, checkpoints, predictions, detections, studies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from trainers import CONFIGS, SMALL_MOTIFS, SMALL_SGTR

from sgalign.commands.main import main

SMALL_IMAGES = {"backbone": "resnet18", "min_size": 48, "max_size": 64, "head_dim": 8, "protocol": "sgdet"}
SMALL_IMAGES |= {"vision": "images", **SMALL_MOTIFS}
MODELS = {
    "motifs": ("AlignMotifsModule", SMALL_MOTIFS),
    "sgtr": ("SGTRModule", SMALL_SGTR),
    "align_sgtr": ("AlignSGTRModule", SMALL_SGTR),
    "images": ("MotifsModule", SMALL_IMAGES),
}


def config(name: str) -> dict[str, object]:
    """Return the config of a tiny training run."""
    kind, options = MODELS[name]
    trainer = {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    trainer |= {"num_sanity_val_steps": 0, "limit_val_batches": 1}
    data = {"root": "in/coco", "images": name != "motifs", "batch_size": 2}
    model = {"class_path": f"sgalign.training.{kind}", "init_args": options}
    return {"seed_everything": 0, "model": model, "data": data, "trainer": trainer}


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Change the current folder in the block."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(*arguments: str) -> None:
    """Run a command that must succeed."""
    assert (code := main(arguments)) == 0, f"sgalign {' '.join(arguments)} ended with {code}"


def make(folder: Path, *, trained: bool = True) -> None:
    """Write the input files to the folder `in` of a folder, without those that need a model if `trained` is False.

    With models, the folder also gets `study`, the runs of a study that is complete.
    """
    (folder / "in").mkdir(parents=True)
    with working_in(folder):
        for name, layout in (("coco", "coco"), ("vg", "vg150"), ("vrd", "vrd")):
            images = [] if name == "coco" else ["--no-images"]
            run("make-dataset", f"in/{name}", "--format", layout, "--sizes", *"421", *images)
        make_study()
        if trained:
            make_trained()
        make_junk()


def make_trained() -> None:
    """Write checkpoints, and the files that are made with them."""
    for name in MODELS:
        Path(f"in/{name}.yaml").write_text(yaml.safe_dump(config(name)))
        run("fit", "--config", f"in/{name}.yaml", "--trainer.logger=false", f"--trainer.default_root_dir={name}")
        (checkpoint,) = Path(name).rglob("*.ckpt")
        checkpoint.rename(f"in/{name}.ckpt")
        shutil.rmtree(name)
    run("export", "in/motifs.ckpt", "in/exported")
    graphs = ["--out", "in/graphs.jsonl", "--hdf5", "in/predictions.h5", "--workers", "0"]
    run("predict", "in/coco/images/0_test_0.jpg", "--checkpoint", "in/sgtr.ckpt", *graphs)
    run("evaluate", *"in/predictions.h5 --annotations in/coco --protocol sgdet --json in/results.json".split())
    found = {"boxes_xyxy": [[1, 2, 30, 40], [5, 5, 60, 50]], "labels": [0, 1], "scores": [0.9, 0.5]}
    Path("in/detections.json").write_text(json.dumps({"0_test_0.jpg": found}))
    run("cache-features", *"--checkpoint in/images.ckpt --data in/coco --out in/features".split())
    run("ablate", "in/small.yaml", "--out", "study")


def make_study() -> None:
    """Write the file of a study with one arm."""
    quiet = {"trainer.num_sanity_val_steps": 0, "trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}
    quiet |= {f"model.{name}": value for name, value in SMALL_MOTIFS.items()}
    shutil.copy(CONFIGS / "motifs_small.yaml", "in/motifs_small.yaml")
    study = {"title": "A title", "config": "motifs_small.yaml", "choose": "val/mR@50", "seeds": 1}
    study["set"] = quiet | {"trainer.max_epochs": 1, "data.root": "in/vg"}
    study["arms"] = [{"name": "Motifs"}]
    Path("in/small.yaml").write_text(yaml.safe_dump(study))


def make_junk() -> None:
    """Write files of the wrong kind."""
    junk = Path("in/junk")
    (junk / "folder").mkdir(parents=True)
    (junk / "empty.json").touch()
    (junk / "empty").touch()
    (junk / "text.yaml").write_text("hello\n")
    (junk / "list.json").write_text("[1, 2]\n")
    (junk / "object.jsonl").write_text("{}\n")
    (junk / "é.jsonl").write_bytes(b"\xff\xfe\n")
    for name in ("predictions.h5", "motifs.ckpt"):
        if Path("in", name).is_file():
            (junk / f"short_{name}").write_bytes(Path("in", name).read_bytes()[:1000])


def listed(folder: Path) -> list[str]:
    """Return the inputs as paths that begin with `in/`, folders of data sets and single files."""
    found = []
    for path in sorted((folder / "in").rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not name.startswith("in/coco/images/") or path.name == "0_test_0.jpg":
            found.append(name)
    return [*found, "in", "in/absent", "in/absent.json", "/dev/null"]
