"""Measure the memory of `sgalign predict` while it predicts many images.

`python -m benchmarks.prediction_memory --images 10000` draws 100 generated scenes, links each under many names, and
prints the memory of the main process after every tenth of the images. It reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sgalign.data import ScenesDataset

DRAWN = 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command, and print a table of images and memory."""
    parser = argparse.ArgumentParser("python -m benchmarks.prediction_memory", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="number of images (default: %(default)s)")
    parser.add_argument("--checkpoint", default="scenes", help="model, as for sgalign predict (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes that read images (default: %(default)s)")
    options = parser.parse_args(arguments)
    step = max(options.images // 10, 1)
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "images", Path(name) / "graphs.jsonl"
        folder.mkdir()
        for number, scene in enumerate(ScenesDataset("test", size=DRAWN)):
            assert scene.image is not None
            scene.image().save(Path(name) / f"{number}.jpg")
        for number in range(options.images):
            (folder / f"{number:07}.jpg").symlink_to(Path(name) / f"{number % DRAWN}.jpg")
        command = [sys.executable, "-m", "sgalign", "predict", folder, "--checkpoint", options.checkpoint, "--out", out]
        process = subprocess.Popen([*command, "--hdf5", Path(name) / "p.h5", "--workers", str(options.workers)])
        print("| images | MiB | images per second |\n|---|---|---|")
        steps, start = iter(range(step, options.images + 1, step)), 0.0
        wanted, done, lines = next(steps), 0, None
        with process:
            while process.poll() is None:
                time.sleep(0.2)
                if out.exists():
                    lines = lines or out.open("rb")
                    start = start or time.monotonic()
                    done += lines.read().count(b"\n")
                    memory = resident(process.pid)
                    if done >= wanted and memory is not None:
                        print(f"| {done} | {memory:.0f} | {done / (time.monotonic() - start):.1f} |", flush=True)
                        wanted = next(steps, options.images + 1)
        if process.returncode:
            sys.exit(f"sgalign predict ended with the exit code {process.returncode}")


def resident(pid: int) -> float | None:
    """Return the resident memory of a process in MiB, or None if it has ended."""
    try:
        found = re.search(r"VmRSS:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None


if __name__ == "__main__":
    main()
