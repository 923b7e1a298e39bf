"""Registers and stack of each CUDA kernel in a built core: `python tests/cuda_resources.py` writes the table again."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "resources.csv"
COLUMNS = ("nvcc", "arch", "kernel", "registers", "stack", "shared")  # shared: what is known before the launch


def find_cuobjdump() -> str | None:
    """On PATH, or what Triton brings."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(bundled)) if bundled else None)


def nvcc_version() -> str | None:
    """The release of the nvcc that setup.py takes, as in 13.0."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if not nvcc:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match[1] if match else None


def usage(module: Path) -> list[dict[str, str]]:
    """A row for each kernel and architecture, without the nvcc that made it."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    output = subprocess.run(
        [cuobjdump, "--dump-resource-usage", module], capture_output=True, text=True, check=True
    ).stdout
    output = subprocess.run(["c++filt"], input=output, capture_output=True, text=True, check=True).stdout
    rows, arch = [], ""
    for line in output.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function .*?(\w+_kernel(?:<[^>]*>)?)\(", line):
            kernel = match[1].replace("sgalign::", "")
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            rows.append({"arch": arch, "kernel": kernel, "registers": match[1], "stack": match[2], "shared": match[3]})
    return sorted(rows, key=lambda row: (int(row["arch"]), row["kernel"]))


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    built = next((TABLE.parents[2] / "sgalign").glob("_C.*.so"))
    rows = [{"nvcc": nvcc_version()} | row for row in usage(built)]  # before the old ones are gone
    if not rows:
        raise SystemExit(f"{built} has no CUDA kernels")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
