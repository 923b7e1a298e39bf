"""Test one wheel with several versions of Python, of torch and of the other packages.

For each combination, the script makes an environment with uv, installs the wheel of its Python, runs the tests of the
operations and a short training, and removes the environment. All combinations of one Python share one wheel. The
script needs `uv` and the versions of Python on PATH, and about 8 GB of disk. It writes logs to the folder `--out`.

The versions are those that pyproject.toml allows, without constraints.txt: the newest, or the oldest of all packages
that pyproject.toml names.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "operations": [
        f"tests/test_{name}.py"
        for name in (
            *("attention", "attention_torch", "alignment", "relation", "random_mask", "core", "dispatch", "nn"),
            *("mirror", "transformers", "compile"),
        )
    ],
    "all": ["tests"],
}
PACKAGES = "torch", "numpy", "transformers", "lightning"  # the table names their versions


class Combination(NamedTuple):
    """The versions of one environment.

    Attributes:
        python: the version of Python, such as "3.11".
        versions: requirements for packages. Their other versions follow from `resolution`.
        resolution: uv's rule for the choice among the versions that the requirements allow.
    """

    python: str
    versions: tuple[str, ...] = ()
    resolution: str = "highest"


COMBINATIONS = {
    "oldest": Combination("3.10", resolution="lowest-direct"),
    "oldest-3.11": Combination("3.11", resolution="lowest-direct"),
    "newest": Combination("3.11"),
    "torch-2.11": Combination("3.11", ("torch==2.11.*",)),
    "torch-2.12": Combination("3.11", ("torch==2.12.*",)),
    "torch-2.13": Combination("3.11", ("torch==2.13.*",)),
    "torch-2.14": Combination("3.11", ("torch==2.14.*",)),
    "python-3.10": Combination("3.10"),
    "python-3.13": Combination("3.13"),
    "python-3.12": Combination("3.12"),
    "numpy-1.26": Combination("3.11", ("numpy==1.26.*",)),
    "python-3.14": Combination("3.14"),
}


def main() -> None:
    """Print one row per combination. End with status 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ", ".join(COMBINATIONS)
    parser.add_argument("combinations", nargs="*", metavar="NAME", help=f"any of {names} (default: all)")
    parser.add_argument("--tests", choices=TESTS, default="operations", help="the tests to run (default: operations)")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of `sgalign compare` (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: 0)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "versions", help="folder of wheels and logs")
    arguments = parser.parse_args()
    if unknown := set(arguments.combinations) - set(COMBINATIONS):
        parser.error(f"unknown combination: {', '.join(sorted(unknown))}; known: {names}")
    failed = False
    columns = ["combination", "Python", *PACKAGES, "install", "tests", "training"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for folder in arguments.out.glob("wheel-*"):  # of an earlier run, perhaps from other sources
        shutil.rmtree(folder)
    for name in arguments.combinations or COMBINATIONS:
        combination, out = COMBINATIONS[name], arguments.out.resolve() / name
        out.mkdir(parents=True, exist_ok=True)
        for left in ("environment", "training"):  # of an earlier run
            shutil.rmtree(out / left, ignore_errors=True)
        for log in out.glob("*.txt"):
            log.unlink()
        if subprocess.run([*FIND, combination.python], capture_output=True).returncode:
            print(
                f"| {name} | {combination.python} | {' | ' * (len(columns) - 3)}skipped: no such Python |", flush=True
            )
            continue
        try:
            cells, works = tried(combination, out, arguments)
        finally:
            shutil.rmtree(out / "environment", ignore_errors=True)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        failed |= not works
    sys.exit(int(failed))


FIND = "uv", "python", "find", "--no-python-downloads"


def tried(combination: Combination, out: Path, arguments: argparse.Namespace) -> tuple[list[str], bool]:
    """Return the cells of a combination's row, and True if everything worked."""
    environment = out / "environment"
    python, sources = environment / "bin" / "python", ["-r", "pyproject.toml", "--extra", "train", "--extra", "test"]
    install = ["uv", "pip", "install", "--python", str(python)]
    make = ["uv", "venv", "--no-python-downloads", "--python", combination.python, str(environment)]
    wheel = wheel_of(combination.python, out)
    begin = time.monotonic()
    installed = wheel and all(
        run(command, out / "install.txt")
        for command in (
            make,
            [*install, "--resolution", combination.resolution, *combination.versions, *sources],
            [*install, "--no-deps", str(wheel)],
        )
    )
    if not installed:
        return [combination.python, *("" for _ in PACKAGES), "FAILED: see install.txt", "", ""], False
    cells = [f"{time.monotonic() - begin:.0f} s"]
    bin_ = environment / "bin"
    pytest = [str(bin_ / "pytest"), "-W", "ignore", "-p", "no:cacheprovider", *TESTS[arguments.tests]]
    options = ["--epochs", str(arguments.epochs), "--seed", str(arguments.seed), "--out", str(out / "training")]
    works = True
    for log, command in (("tests.txt", pytest), ("training.txt", [str(bin_ / "sgalign"), "compare", *options])):
        begin = time.monotonic()
        succeeded = run(command, out / log)
        works &= succeeded
        counts = re.findall(r"^=*\s*(\d+ (?:passed|failed).*?) in ", (out / log).read_text(), re.M)
        outcome = [] if succeeded else [f"FAILED: see {log}"]
        cells.append(", ".join([*outcome, *counts[-1:], f"{time.monotonic() - begin:.0f} s"]))
    return [*versions_in(python), *cells], works


def wheel_of(python: str, out: Path) -> Path | None:
    """Return the wheel for a Python, or None if it cannot be built. All combinations of a Python use the same one."""
    folder = out.parent / f"wheel-{python}"
    if not list(folder.glob("*.whl")):
        build = ["uv", "build", "--wheel", "--no-python-downloads", "--python", python, "--out-dir", str(folder)]
        run(build, out / "install.txt")
    return next(folder.glob("*.whl"), None)


def versions_in(python: Path) -> list[str]:
    """Return the versions of Python and of `PACKAGES` in an environment."""
    code = (
        "import platform, sys, importlib.metadata as m; print(platform.python_version(), *map(m.version, sys.argv[1:]))"
    )
    return subprocess.run([python, "-c", code, *PACKAGES], check=True, capture_output=True, text=True).stdout.split()


def run(command: list[str], log: Path) -> bool:
    """Run a command in the root of the repository. Append its output to a log, and return True if it succeeded.

    PYTHONSAFEPATH keeps Python 3.11 and newer from importing the source tree instead of the wheel.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "SGALIGN_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    with open(log, "a") as file:
        return subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, env=environment).returncode == 0


if __name__ == "__main__":
    main()
