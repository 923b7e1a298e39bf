"""Registers, stack and instructions of each CUDA kernel in a built core.

`python tests/cuda_resources.py` writes the table again. `PYTHONPATH=. python tests/cuda_resources.py scores` prints the
instructions per score of the attention kernels, from this table and, for Triton's kernels, from compiled_kernels.csv.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from assembly import NVIDIA, largest_body, loops

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "resources.csv"
# "shared" is static shared memory, without the dynamic memory that a launch requests. "loop" is the number of
# instructions in a step of the walk over keys, queries or pairs. It is counted for one architecture only, because
# disassembling takes half a minute for each.
COLUMNS = ("nvcc", "arch", "kernel", "registers", "stack", "shared", "loop")
COUNTED = "90"  # the architecture whose instructions are counted


def find_tool(name: str) -> str | None:
    """Return the path of cuobjdump or nvdisasm: the one on PATH, otherwise the one in Triton's package."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which(name) or (shutil.which(name, path=str(bundled)) if bundled else None)


def nvcc_version() -> str | None:
    """Return the release of the nvcc that setup.py uses, for example 13.0."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if not nvcc:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match[1] if match else None


def usage(module: Path) -> list[dict[str, str]]:
    """Return a row for each kernel and architecture, without the column "nvcc"."""
    output = run(find_tool("cuobjdump"), "--dump-resource-usage", module)
    rows, arch, counts = [], "", loop_instructions(module)
    for line in output.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\w+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            figures = dict(zip(("registers", "stack", "shared"), match.groups()))
            loop = str(counts[function]) if arch == COUNTED else ""
            rows.append({"arch": arch, "kernel": function, **figures, "loop": loop})
    names = subprocess.run(["c++filt"], input="\n".join(row["kernel"] for row in rows), capture_output=True, text=True)
    for row, name in zip(rows, names.stdout.splitlines(), strict=True):
        row["kernel"] = re.search(r"\w+_kernel(?:<[^>]*>)?(?=\()", name)[0].replace("sgalign::", "")
    return sorted(rows, key=lambda row: (int(row["arch"]), row["kernel"]))


def loop_instructions(module: Path) -> dict[str, int]:
    """Return the instructions in a step of each kernel for the architecture COUNTED, by mangled name."""
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        run(find_tool("cuobjdump"), "--extract-elf", f"sm_{COUNTED}", module.resolve(), cwd=folder)
        for cubin in Path(folder).glob("*.cubin"):
            for part in run(find_tool("nvdisasm"), "--print-code", cubin).split("\t.section\t.text.")[1:]:
                counts[part.partition(",")[0]] = largest_body(loops(part, NVIDIA)[1])
    return counts


def run(*command: object, cwd: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


# Triton's name for each kernel, and the scores that a thread computes per step at up to 64 channels of 16 bits.
SCORES = {
    "attention_forward_kernel<Half, {dim}, 1, true>": ("forward", 64),
    "attention_grad_query_kernel<Half, {dim}, true>": ("query_gradient", 64),
    "attention_grad_key_kernel<Half, {dim}, true>": ("key_value_gradient", 32),
}


def print_scores() -> None:
    """Print a Markdown table of instructions per score, for one float16 branch with random mask and padding.

    Triton's numbers are those of the newest version in its table. A kernel that has no row with padding there is shown
    without padding.
    """
    from compiled_kernels import read_table

    from sgalign.kernels import configs

    ours = {row["kernel"]: int(row["loop"]) for row in read() if row["arch"] == COUNTED}
    triton = read_table()
    newest = max(version for version, *_ in triton)
    print("| kernel | channels | CUDA C++ | Triton |\n|---|---|---|---|")
    for kernel, (name, scores) in SCORES.items():
        for dim in (32, 64):
            plan = configs.lookup(name, f"sm_{COUNTED}", 16, dim, 1, False)
            row = newest, f"sm_{COUNTED}", f"attention {name.replace('_', ' ')}: fp16, {dim} channels, one branch"
            theirs = triton.get((*row[:2], f"{row[2]}, padding"), triton[row])
            per_score = theirs.loop / (plan.block_q * plan.block_k / 32 / plan.warps)
            mine = ours[kernel.format(dim=dim)] / scores
            print(f"| {name.replace('_', ' ')} | {dim} | {mine:.1f} | {per_score:.1f} |")


def write() -> None:
    built = next((TABLE.parents[2] / "sgalign").glob("_C.*.so"))
    rows = [{"nvcc": nvcc_version()} | row for row in usage(built)]  # may fail, so before the table is overwritten
    if not rows:
        raise SystemExit(f"{built} has no CUDA kernels")
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    print_scores() if sys.argv[1:] == ["scores"] else write()
