"""Build script of the compiled core sgalign._C.

The build needs ninja and pybind11, but not torch. docs/building.md describes the environment variables that it reads.
"""

import hashlib
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
sys.path.insert(0, str(ROOT / "csrc"))
sys.dont_write_bytecode = True  # leaves no csrc/__pycache__ in the source tree
from compilers import COMPILING, ENVIRONMENT, LINKING, find_compiler, find_nvcc, for_host, refusal  # noqa: E402

FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]

# Name, vector size in bytes and compiler flags. Each file csrc/cpu/*.cpp is compiled once per instruction set. The
# fastest one that the processor supports is chosen at run time, so the build machine's processor does not matter.
INSTRUCTION_SETS = [("baseline", 16, [])]
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS += [
        ("avx2", 32, ["-mavx2", "-mfma"]),
        # gcc 12 warns about an uninitialized variable in its own avx512fintrin.h.
        ("avx512", 64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-uninitialized"]),
    ]

HEADERS = (".h", ".cuh")
CUDA_TYPES = ("Half", "BFloat16", "float")  # each file csrc/cuda/*_*.cu is compiled once per type


def digest_with_headers(source: Path) -> str:
    """Return a digest of a source and the headers that it may include."""
    headers = [path for folder in {ROOT / "csrc", source.parent} for path in folder.iterdir() if path.suffix in HEADERS]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted([source, *headers]))).hexdigest()[:16]


class NinjaBuild(build_ext):
    """The build command. It compiles changed files, and also leaves the module in the source folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = BUILD / f"ninja-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        module = folder / target.name
        self.write_ninja_file(folder, module)
        jobs = os.environ.get("MAX_JOBS", "")
        if jobs and not jobs.isdecimal():
            sys.exit(f"sgalign: MAX_JOBS must be a number, got {jobs}")
        subprocess.run(
            [sys.executable, "-m", "ninja", "-C", folder, *(["-j", jobs] if jobs else [])], check=True, env=ENVIRONMENT
        )
        in_sources = [ROOT / "sgalign" / target.name] if os.access(ROOT / "sgalign", os.W_OK) else []
        for destination in (target, *in_sources):
            # The file is replaced, not overwritten, because a process may have the old one loaded.
            shutil.copy2(module, destination.with_suffix(".new"))
            os.replace(destination.with_suffix(".new"), destination)

    def write_ninja_file(self, folder: Path, module: Path) -> None:
        try:
            import pybind11
            from ninja import ninja_syntax
        except ModuleNotFoundError as error:
            needed = "pip install 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13'"
            sys.exit(f"sgalign: a build without isolation needs {error.name}: run `{needed}`")
        for name, path in {
            "csrc": ROOT / "csrc", "python": sysconfig.get_path("include"), "pybind11": pybind11.get_include()
        }.items():  # fmt: skip
            # Links have plain names. The paths may have characters that the tools cannot handle.
            link = folder / f"{name}.{os.getpid()}"  # replaces the old link at once, because two builds may run
            link.symlink_to(path)
            os.replace(link, folder / name)
        compiler = find_compiler()
        openmp = [] if refusal(compiler, [*COMPILING, "-fopenmp", *LINKING]) else ["-fopenmp"]
        if not openmp:
            print(f"sgalign: {compiler[0]} has no OpenMP here, so the kernels will use one thread", file=sys.stderr)
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
        digest = runpy.run_path(str(ROOT / "sgalign" / "ops" / "_source_digest.py"))["source_digest"](ROOT / "csrc")
        bindings = ["-Ipython", "-Ipybind11", f'-DSGALIGN_SOURCES="{digest}"', f'-DSGALIGN_COMPILER="{version}"']
        bindings += [f"-DSGALIGN_{name.upper()}" for name, _, _ in INSTRUCTION_SETS]
        nvcc, archs = find_nvcc(compiler)
        if archs:
            bindings += ["-DSGALIGN_CUDA", f'-DSGALIGN_CUDA_ARCHS="{" ".join(archs)}"']
        objects = [("bindings", "compile", "bindings.cpp", bindings)]
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            for name, width, flags in INSTRUCTION_SETS:
                names = [f"-DSGALIGN_VECTOR_BYTES={width}", f"-DSGALIGN_KERNELS={source.stem}_{name}"]
                objects.append((f"{source.stem}_{name}", "compile", f"cpu/{source.name}", [*flags, *names]))
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if archs else ():
            for name in CUDA_TYPES if "_" in source.stem else ("",):
                objects.append((f"{source.stem}_{name}", "cuda", f"cuda/{source.name}", [f"-DSGALIGN_TYPE={name}"]))
        # All targets share one PTX code, which halves the build time and serves later GPUs.
        targets = "compute_80", *(f"sm_{arch}" for arch in archs)
        codes = [f"-gencode=arch=compute_80,code={target}" for target in targets]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        # The CUDA runtime is linked in, so it need not be the version that comes with torch.
        host = [*openmp, *LINKING, *undefined]
        linker = [*nvcc, "-shared", "-cudart=static", *for_host(host)] if archs else [*compiler, "-shared", *host]

        def command(*words: str) -> str:
            return shlex.join(words).replace("$", "$$")

        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=10_000)
            for rule, words in (
                ("compile", [*compiler, *FLAGS, *openmp, *COMPILING, "-std=c++20"]),
                ("cuda", [*nvcc, "-O3", *for_host(COMPILING), "-std=c++20", *codes]),
            ):
                line = f"{command(*words)} -MMD -MF $out.d $flags -c $in -o $out"
                writer.rule(rule, line, depfile="$out.d", deps="gcc")
            writer.rule("link", f"{command(*linker)} $in -o $out")
            for name, rule, source, flags in objects:
                # ninja compares times alone. The digest makes it compile a source that was replaced by an older file.
                flags = [*flags, f"-DSGALIGN_SOURCE={digest_with_headers(ROOT / 'csrc' / source)}"]
                writer.build(f"{name}.o", rule, f"csrc/{source}", variables={"flags": command(*flags)})
            writer.build(module.name, "link", [f"{name}.o" for name, *_ in objects])


written = (path for path in (ROOT, ROOT / "build", ROOT / "sgalign.egg-info") if path.exists())
if all(os.access(path, os.W_OK) for path in written):
    BUILD, options = ROOT / "build", {}
else:
    temporary = tempfile.TemporaryDirectory()  # Python removes it when the process ends
    BUILD = Path(temporary.name)
    options = {"build": {"build_base": temporary.name}, "egg_info": {"egg_base": temporary.name}}
setup(ext_modules=[Extension("sgalign._C", ["csrc/bindings.cpp"])], cmdclass={"build_ext": NinjaBuild}, options=options)
