"""Show which packages are installed and which backends run on this machine, and how to enable other backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from sgalign import _version, dual_branch_attention
from sgalign.errors import InputError
from sgalign.ops import _core, backends
from sgalign_command import WAIT_SETTINGS

EXTRAS = "train", "test"
REQUIREMENT = re.compile(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w.-]+)['\"]")


def main() -> int:
    """Print the report and return 0 if the package works, 1 otherwise."""
    print(f"sgalign {_version.__version__} in {Path(__file__).parents[1]}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    for extra in EXTRAS:
        if (packages := required(extra)) is None:
            print(f"[{extra}] unknown: sgalign is not installed. Install it to see which packages this extra needs")
            continue
        versions = {package: _installed_version(package) for package in packages}
        found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
        print("; ".join([f"[{extra}] {found or 'nothing'}", *missing(extra)]))
    print("backends")
    for backend in backends.BACKENDS:
        print(f"  {backend}: {backends.unavailable(backend) or 'available'}")
    chosen = (backends.choose(None, torch.device(device), torch.float32) for device in ("cpu", "cuda"))
    print("  default for CPU tensors: {}; for GPU tensors: {}, or reference for float64".format(*chosen))
    precise = _precision_is_valid()
    if _core.problem():
        return 1
    core = _core.load()
    sets = core.instruction_sets()
    print(f"core built by {core.compiler}")
    if archs := getattr(core, "cuda_archs", ""):
        print(f"  CUDA C++ kernels for compute capability {', '.join(f'{int(arch) / 10}' for arch in archs.split())}")
    print(f"  instruction set {core.instruction_set()} (this processor also runs {', '.join(sets[1:]) or 'no other'})")
    print(f"  {_threads(core.openmp)}")
    if any("libgomp" in runtime for runtime in openmp_runtimes() or []):
        print(f"  {waiting()}")
    tried = [
        "cpu",
        *(name for name in backends.ON_GPU if torch.cuda.is_available() and not backends.unavailable(name)),
    ]
    return 0 if all([precise, *map(_works, tried)]) else 1


def required(extra: str) -> list[str] | None:
    """Return the packages that an extra needs, or None if sgalign is not installed but runs from a source tree."""
    try:
        requirements = importlib.metadata.requires("sgalign") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (REQUIREMENT.match(requirement) for requirement in requirements)
    return [match[1] for match in found if match and match[2] == extra]


def missing(extra: str) -> list[str]:
    """Return a list with one phrase that names the missing packages of an extra, or an empty list if none is missing.

    The list is also empty if sgalign itself is not installed, because the packages are then unknown.
    """
    packages = [package for package in required(extra) or [] if _installed_version(package) is None]
    return [f"not installed: {', '.join(packages)}. Run pip install 'sgalign[{extra}]'"] if packages else []


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _precision_is_valid() -> bool:
    """Print the precision that SGALIGN_TRITON_DOT_PRECISION asks for, and return False if it is not a valid one."""
    if backends.HAS_TRITON:
        from sgalign.kernels import configs

        try:
            if configs.ASKED_PRECISION:
                print(
                    f"  triton multiplies float32 matrices with {configs.dot_precision()} "
                    "(SGALIGN_TRITON_DOT_PRECISION)"
                )
        except InputError as error:
            print(f"  triton: {error}")
            return False
    return True


def _threads(openmp: bool) -> str:
    if not openmp:
        return "1 thread: the core was built without OpenMP"
    count = f"{torch.get_num_threads()} threads (torch.get_num_threads)"
    runtimes = openmp_runtimes()
    if runtimes is None:
        return count
    if len(runtimes) == 1:
        return f"{count}. The core and torch share one OpenMP runtime, {runtimes[0]}"
    return f"{count}. The core and torch do not share threads: {len(runtimes)} OpenMP runtimes, {', '.join(runtimes)}"


def waiting() -> str:
    """Return a sentence that says how the threads of GNU's OpenMP wait for each other in this process."""
    if settings := [f"{name}={os.environ[name]}" for name in WAIT_SETTINGS if os.environ.get(name)]:
        return f"threads wait for each other as {', '.join(settings)} says (docs/training.md, Busy machines)"
    return f"threads spin for milliseconds while they wait, because neither {' nor '.join(WAIT_SETTINGS)} is set"


def openmp_runtimes() -> list[str] | None:
    """Return the paths of the OpenMP runtimes in this process, or None if unknown.

    Each runtime has its own thread pool.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    _core.load()
    return sorted(set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so[^/\s]*", maps.read_text())))


def _works(backend: str) -> bool:
    """Run a backend once, print the result, and return True if it agrees with the reference."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, length, 32, generator=generator) for length in (9, 9, 300, 300)]
    expected = dual_branch_attention(*tensors, mask_ratio=0.1, mask_seed=0, backend="reference")
    device = "cpu" if backend == "cpu" else "cuda"
    try:
        outs = dual_branch_attention(*(t.to(device) for t in tensors), mask_ratio=0.1, mask_seed=0, backend=backend)
        error = max((a.cpu() - b).abs().max().item() for a, b in zip(outs, expected))
    except Exception as problem:  # a driver, a compiler or a kernel may raise any error, and the report shows it
        print(f"  {backend}: dual-branch attention fails: {type(problem).__name__}: {problem}")
        return False
    works = error < 1e-5
    print(
        f"  {backend}: dual-branch attention differs from the reference by {error:.1e}: {'fine' if works else 'WRONG'}"
    )
    return works
