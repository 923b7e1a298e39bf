"""Fuzz the readers of data sets."""

import json
from pathlib import Path

import atheris
from fuzzing import Draw, Target, changed_bytes, changed_json, main

with atheris.instrument_imports(include=["sgalign"]):
    from sgalign.data.vrd import VRDDataset


def vrd(draw: Draw, folder: Path) -> None:
    box = {"category": 0, "bbox": [10, 60, 20, 80]}
    annotations = {
        "a.jpg": [{"subject": box, "predicate": 1, "object": {"category": 1, "bbox": [0, 5, 1, 9]}}],
        "b.jpg": [],
    }
    files = {"annotations_test": annotations, "objects": ["person", "horse"], "predicates": ["on", "above"]}
    for name, content in files.items():
        changed = json.dumps(changed_json(draw, content)).encode()
        (folder / f"{name}.json").write_bytes(
            changed_bytes(draw, changed) if draw.ConsumeIntInRange(0, 9) == 0 else changed
        )
    list(VRDDataset(folder, "test"))


TARGETS: dict[str, Target] = {"vrd": vrd}

if __name__ == "__main__":
    main(TARGETS)
