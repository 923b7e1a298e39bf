"""Build script of the compiled core sgalign._C.

The build needs ninja, but not torch. docs/cuda.md describes SGALIGN_CUDA and SGALIGN_CUDA_ARCHS.
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

# Name, vector size in bytes and compiler flags. Each file csrc/cpu/*.cpp is compiled once per instruction set. The
# fastest one that the processor supports is chosen at run time, so the build machine's processor does not matter.
INSTRUCTION_SETS = [("baseline", 16, [])]
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS += [
        ("avx2", 32, ["-mavx2", "-mfma"]),
        # gcc 12 warns about an uninitialized variable in its own avx512fintrin.h.
        ("avx512", 64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-uninitialized"]),
    ]

# architectures to compile for, if the compiler knows them; 8.6 and 8.9 run the code of 8.0
CUDA_ARCHS = "80,90,100,120"
CUDA_TYPES = ("Half", "BFloat16", "float")  # each file csrc/cuda/*_*.cu is compiled once per type


def find_nvcc(compiler: str) -> tuple[str, list[str]]:
    """Return the nvcc command and the architectures. For a core without CUDA there are none, and stderr says why."""
    wanted, home = os.environ.get("SGALIGN_CUDA") or "auto", os.environ.get("CUDA_HOME")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"sgalign: SGALIGN_CUDA must be 0, 1 or auto, got {wanted}")
    nvcc = os.path.join(home, "bin", "nvcc") if home else "nvcc"
    words = shlex.split(compiler)  # from "ccache g++ -pthread", nvcc gets g++ and, separately, the options
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    flags = [f"-Xcompiler={flag}" for flag in ("-fPIC", "-fvisibility=hidden", *words[first:])]
    command = shlex.join([nvcc, "-ccbin", words[first - 1], *flags])
    why = "SGALIGN_CUDA is 0" if wanted == "0" else refusal(command, ["-x", "cu"])
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


def find_compiler() -> str:
    """Return CXX if it is set, otherwise the first of g++, clang++ and c++ on PATH that compiles C++20."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for compiler in candidates:
        if not refusal(compiler, []):
            return compiler
    sys.exit(f"sgalign: no C++20 compiler in {', '.join(candidates)}: install g++ 11 or clang 14, or set CXX")


def refusal(compiler: str, flags: list[str]) -> str:
    """Return why a C++20 program with these flags does not compile and link, or "" if it does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <bit>\nint main() { return !new int(std::popcount(0u)); }\n")
        command = [*shlex.split(compiler), "-std=c++20", *flags, str(source), "-o", str(source.with_suffix(""))]
        try:
            tried = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            return f"{command[0]} cannot be run: {error.strerror}"
        said = [line for line in tried.stderr.splitlines() if "error" in line or "fatal" in line]
        return f"{command[0]} cannot compile C++20: {said[0] if said else tried.stderr}" if tried.returncode else ""


class NinjaBuild(build_ext):
    """The build command. It compiles changed files, and also leaves the module in the source folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        module = folder / target.name
        self.write_ninja_file(folder, module)
        subprocess.run([sys.executable, "-m", "ninja", "-C", folder], check=True)
        for destination in (target, ROOT / "sgalign" / target.name):
            # The file is replaced, not overwritten, because a process may have the old one loaded.
            shutil.copy2(module, destination.with_suffix(".new"))
            os.replace(destination.with_suffix(".new"), destination)

    def write_ninja_file(self, folder: Path, module: Path) -> None:
        import pybind11
        from ninja import ninja_syntax

        compiler = find_compiler()
        openmp = [] if refusal(compiler, ["-fopenmp"]) else ["-fopenmp"]
        if not openmp:
            print(f"sgalign: {compiler} has no OpenMP here, so the kernels will use one thread", file=sys.stderr)
        command = [*shlex.split(compiler), "--version"]
        version = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
        digest = runpy.run_path(str(ROOT / "sgalign" / "ops" / "_source_digest.py"))["source_digest"](ROOT / "csrc")
        includes = [shlex.quote(f"-I{path}") for path in (sysconfig.get_path("include"), pybind11.get_include())]
        bindings = [*includes, f'-DSGALIGN_SOURCES=\\"{digest}\\"', f"-DSGALIGN_COMPILER='\"{version}\"'"]
        bindings += [f"-DSGALIGN_{name.upper()}" for name, _, _ in INSTRUCTION_SETS]
        nvcc, archs = find_nvcc(compiler)
        if archs:
            bindings += ["-DSGALIGN_CUDA", f"-DSGALIGN_CUDA_ARCHS='\"{' '.join(archs)}\"'"]
        objects = [("bindings", "compile", "bindings.cpp", bindings)]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for name, width, flags in INSTRUCTION_SETS:
                names = [f"-DSGALIGN_VECTOR_BYTES={width}", f"-DSGALIGN_KERNELS={source.stem}_{name}"]
                objects.append((f"{source.stem}_{name}", "compile", f"cpu/{source.name}", [*flags, *names]))
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if archs else ():
            for name in CUDA_TYPES if "_" in source.stem else ("",):
                objects.append((f"{source.stem}_{name}", "cuda", f"cuda/{source.name}", [f"-DSGALIGN_TYPE={name}"]))
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=10_000)
            command = " ".join([compiler, *FLAGS, *openmp])
            writer.rule("compile", f"{command} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
            linker = " ".join([compiler, "-shared", *openmp])
            if archs:
                # All targets share one PTX code, which halves the build time and serves later GPUs.
                targets = "compute_80", *(f"sm_{arch}" for arch in archs)
                codes = " ".join(f"-gencode=arch=compute_80,code={target}" for target in targets)
                compile_cuda = f"{nvcc} -std=c++20 -O3 {codes} -MMD -MF $out.d $flags -c $in -o $out"
                writer.rule("cuda", compile_cuda, depfile="$out.d", deps="gcc")
                # The CUDA runtime is linked in, so it need not be the version that comes with torch.
                linker = " ".join([nvcc, "-shared -cudart=static", *(f"-Xcompiler={flag}" for flag in openmp)])
            undefined = " -undefined dynamic_lookup" if sys.platform == "darwin" else ""
            writer.rule("link", f"{linker}{undefined} $in -o $out")
            for name, rule, source, flags in objects:
                writer.build(f"{name}.o", rule, str(ROOT / "csrc" / source), variables={"flags": " ".join(flags)})
            writer.build(module.name, "link", [f"{name}.o" for name, *_ in objects])


setup(ext_modules=[Extension("sgalign._C", ["csrc/bindings.cpp"])], cmdclass={"build_ext": NinjaBuild})
