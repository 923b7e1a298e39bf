"""Finds the compilers for setup.py, and their flags in the environment."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# architectures to compile for, if the compiler knows them; 8.6 and 8.9 run the code of 8.0
CUDA_ARCHS = "80,90,100,120"
# Compilers write temporary files to the folder they run in. nvcc cannot use a TMPDIR with special characters.
ENVIRONMENT = os.environ | {"TMPDIR": "."}


def words(name: str) -> list[str]:
    """Return the words of an environment variable, as a shell splits them."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        sys.exit(f"sgalign: {name} must be words for a shell, got {os.environ[name]} ({error})")


def for_host(flags: Sequence[str]) -> list[str]:
    """Return flags of the C++ compiler as arguments of nvcc. Commas are escaped, because nvcc splits at them."""
    return [f"-Xcompiler={shlex.quote(flag)}".replace(",", "\\,") for flag in flags]


# the user's flags
COMPILING, LINKING = words("CPPFLAGS") + words("CXXFLAGS"), words("LDFLAGS")


def find_nvcc(compiler: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the nvcc command and the architectures. Without CUDA, there are none, and stderr gives the reason."""
    wanted, home = os.environ.get("SGALIGN_CUDA") or "auto", os.environ.get("CUDA_HOME")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"sgalign: SGALIGN_CUDA must be 0, 1 or auto, got {wanted}")
    nvcc = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    # From "ccache g++ -pthread", nvcc gets g++ and, separately, the options.
    first = next((i for i, word in enumerate(compiler) if word.startswith("-")), len(compiler))
    command = [nvcc, "-ccbin", compiler[first - 1], *for_host(["-fPIC", "-fvisibility=hidden", *compiler[first:]])]
    why = "SGALIGN_CUDA is 0" if wanted == "0" else refusal(command, [*for_host(COMPILING + LINKING), "-x", "cu"])
    if why:
        if wanted == "1":
            sys.exit(f"sgalign: SGALIGN_CUDA is 1, but {why}")
        print(f"sgalign: built for the CPU alone, without CUDA C++ kernels: {why}", file=sys.stderr)
        return command, []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    offered = [code[3:] for code in known if code[3:].isdigit() and int(code[3:]) >= 80]
    if not offered:
        sys.exit(f"sgalign: {nvcc} --list-gpu-code lists no architecture from 80 on: update CUDA or set SGALIGN_CUDA=0")
    archs = list(dict.fromkeys(os.environ.get("SGALIGN_CUDA_ARCHS", "").replace(",", " ").split()))
    if not set(archs) <= set(offered):
        sys.exit(f"sgalign: SGALIGN_CUDA_ARCHS must only contain {', '.join(offered)}, got {', '.join(archs)}")
    return command, archs or [arch for arch in CUDA_ARCHS.split(",") if arch in offered]


def find_compiler() -> list[str]:
    """Return CXX if it is set, otherwise the first of g++, clang++ and c++ on PATH that compiles C++20."""
    # A relative path is made absolute, because the compiler runs in other folders.
    given = [os.path.abspath(word) if os.sep in word and word[0] != "-" else word for word in words("CXX")]
    reasons = []
    for compiler in [given] if given else [["g++"], ["clang++"], ["c++"]]:
        reasons.append(refusal(compiler, COMPILING + LINKING))
        if not reasons[-1]:
            return compiler
    sys.exit(f"sgalign: {'; '.join(reasons)}: install g++ 11 or clang 14, or set CXX")


def refusal(compiler: Sequence[str], flags: Sequence[str]) -> str:
    """Return why a C++20 program with these flags does not compile and link, or "" if it does."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cpp").write_text("#include <bit>\nint main() { return !new int(std::popcount(0u)); }\n")
        command = [*compiler, *flags, "-std=c++20", "probe.cpp", "-o", "probe"]
        try:
            tried = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT)
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        said = [line for line in tried.stderr.splitlines() if "error" in line or "fatal" in line]
        return f"{command[0]} cannot compile C++20: {said[0] if said else tried.stderr}" if tried.returncode else ""
