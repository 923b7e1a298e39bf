"""The build, the import and the memory of the compiled core, and its tests under sanitizers."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from target import ROOT, SANITIZE

import sgalign
from sgalign.ops import _core
from sgalign.ops._source_digest import source_digest

PACKAGE = Path(sgalign.__file__).resolve().parent.parent  # folder of the tested package, installed or not


def run_python(code, folder=PACKAGE, **environment):
    """Return the output of `code` in a new process, where `import sgalign` imports the package in `folder`."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


MEMORY = """
import os
import torch
from sgalign import dual_branch_attention, fused_masked_attention

def peak():  # KiB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def attend(length):
    query, mirrored_query, key, value = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(4))
    options = {"mask_ratio": 0.4, "mask_seed": 0, "dropout_p": 0.1}
    fused_masked_attention(query, key, value, **options).sum().backward()
    for mirror in (query, mirrored_query):
        sum(out.sum() for out in dual_branch_attention(query, mirror, key, value, **options)).backward()

torch.set_num_threads(2)  # each thread has working memory
attend(300)  # starts the libraries and the threads
before = peak()
attend(8192)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which has the peak memory")
def test_memory_does_not_grow_with_the_square_of_the_length():
    """One byte for each of 8192 x 8192 pairs would add 64 MiB to about 70."""
    assert int(run_python(MEMORY)) < 110 * 1024


IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import sgalign
print(time.perf_counter() - start)
print(*(name for name in set(sys.modules) - before if "." not in name))
"""


def test_import_is_fast_and_loads_no_heavy_package():
    for _ in range(3):  # because a busy machine may be slow once
        seconds, modules = run_python(IMPORT).split("\n")
        if float(seconds) < 0.6:
            break
    assert float(seconds) < 0.6
    heavy = {"triton", "lightning", "pytorch_lightning", "matplotlib", "torchmetrics", "h5py", "tensorboard", "PIL"}
    assert not heavy & set(modules.split())


def test_core_is_loaded_at_first_use():
    assert run_python("import sgalign, sys; print('sgalign._C' in sys.modules)") == "False"


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources with the built core."""
    for folder in ("sgalign", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    shutil.copy2(_core.load().__file__, tmp_path / "sgalign")
    return tmp_path


USE = """
import torch
from sgalign import fused_masked_attention, random_attention_mask
from sgalign.ops import _core
x = torch.ones(1, 1, 2, 3)
for call in (lambda: fused_masked_attention(x, x, x), lambda: random_attention_mask(1, 1, 2, 2, ratio=0.5, seed=0)):
    try:
        call()
        print("fine")
    except ImportError as error:
        print(error)
        assert _core.problem() == str(error)
fused_masked_attention(x, x, x, mask_ratio=0.5, backend="reference")  # needs no core
"""


def test_copied_package_works(copy):
    assert run_python(USE, copy) == "fine\nfine"


def test_error_of_a_missing_core_says_how_to_build_it(copy):
    for core in (copy / "sgalign").glob("_C.*"):
        core.unlink()
    message = f"sgalign's compiled core is not built in {copy}: {_core.BUILD}"
    assert run_python(USE, copy) == f"{message}\n{message}"


def test_error_of_a_stale_core_says_how_to_build_it(copy):
    with (copy / "csrc" / "cpu" / "attention.cpp").open("a") as file:
        file.write("// changed\n")
    message = f"sgalign's compiled core was built from other sources than those in {copy}: {_core.BUILD}"
    assert run_python(USE, copy) == f"{message}\n{message}"


def test_core_without_sources_is_not_stale(copy):
    """An installed package has no csrc beside it."""
    shutil.rmtree(copy / "csrc")
    assert run_python(USE, copy) == "fine\nfine"


def test_source_digest_depends_on_names_and_contents_of_sources_alone(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.cpp").write_text("1")
    digests = [source_digest(tmp_path)]
    (tmp_path / "notes.txt").write_text("2")
    assert source_digest(tmp_path) == digests[0]
    (tmp_path / "cpu" / "a.cpp").write_text("2")
    digests.append(source_digest(tmp_path))
    (tmp_path / "cpu" / "a.cpp").rename(tmp_path / "a.cpp")
    digests.append(source_digest(tmp_path))
    (tmp_path / "b.cu").write_text("")
    digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 4


def test_folder_kernels_has_no_version():
    """transformers looks for a package named kernels. It must not take this folder for that package."""
    code = """
import kernels, sgalign.kernels
print(hasattr(kernels, "__version__"))
"""
    assert run_python(code, ROOT) == "False"


def test_only_kernels_can_be_imported_beside_the_package():
    """In a source tree, the root's other files and folders, such as setup.py, are not modules of the package."""
    code = """
import sgalign.kernels
from importlib.util import find_spec
print(sgalign.kernels.__file__, [find_spec(f"sgalign.{name}") for name in ("setup", "tests", "benchmarks")])
"""
    assert run_python(code, ROOT) == f"{ROOT / 'kernels' / '__init__.py'} [None, None, None]"


def test_baseline_is_the_last_instruction_set():
    core = _core.load()
    sets = core.instruction_sets()
    assert sets[-1] == "baseline" and core.instruction_set() in sets


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="the instruction set must be one that this processor supports, got 'abacus'"):
        _core.load().use_instruction_set("abacus")


# ------------------------------------------------------------------------------------------------------ sanitizers

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Instruction set, bytes per vector and flags. The compiler splits vectors of 64 bytes for AVX2. They stand in for the
# AVX-512 code on processors without AVX-512.
SANITIZED = [("baseline", 16, []), ("avx2", 32, AVX2), ("avx2", 64, AVX2)]
# Tests of every dtype and of accesses at the edges of memory. Other tests are left out, because sanitized code takes
# seconds instead of milliseconds.
SANITIZED_TESTS = (
    "gradients_are_accurate and (all or none or True or False) or layout_changes or overlapping or strides_of_mask"
    " or broadcasts or without_a_kept_entry or leak or rising or empty or number_of_threads or compiled_mask"
    " or shape_and_stride or as_accurate_as_plain"
)


def build_sanitized(folder, width, flags):
    """Replace the core in `folder` by a sanitized one that has these kernels alone and calls them the baseline."""
    import pybind11

    module = next((folder / "sgalign").glob("_C.*"))
    module.unlink()
    digest = source_digest(folder / "csrc")
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wno-psabi"]
    command += [*SANITIZE, *flags, "-DSGALIGN_POISON", f"-DSGALIGN_VECTOR_BYTES={width}"]
    command += [f'-DSGALIGN_SOURCES="{digest}"', '-DSGALIGN_COMPILER="g++"']
    command += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    for name in ("cpu/attention", "cpu/relation", "cpu/alignment", "bindings"):
        kernels = f"-DSGALIGN_KERNELS={Path(name).name}_baseline"
        target = f"{Path(name).name}.o"
        subprocess.run([*command, kernels, "-c", f"csrc/{name}.cpp", "-o", target], cwd=folder, check=True)
    objects = ["attention.o", "relation.o", "alignment.o", "bindings.o"]
    subprocess.run([*command, "-shared", *objects, "-o", str(module)], cwd=folder, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ and its sanitizers")
@pytest.mark.parametrize("name, width, flags", SANITIZED, ids=lambda value: str(value) if value != AVX2 else "")
def test_operations_pass_the_sanitizers(copy, name, width, flags):
    """No access is out of bounds, no behavior is undefined, and no result depends on memory that was never written."""
    if name not in _core.load().instruction_sets():
        pytest.skip(f"this processor cannot run {name}")
    pytest.importorskip("pybind11")
    build_sanitized(copy, width, flags)
    (copy / "tests").mkdir()
    for file in (
        "conftest.py",
        "target.py",
        "accuracy.py",
        "covers.py",
        "test_attention.py",
        "test_random_mask.py",
        "test_relation.py",
        "test_alignment.py",
    ):
        shutil.copy2(ROOT / "tests" / file, copy / "tests")
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "tests"] + ["-k", SANITIZED_TESTS],
        cwd=copy,
        env=os.environ
        | {"PYTHONPATH": str(copy), "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[:3000]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="the emulation needs x86-64")
@pytest.mark.parametrize(
    "processor, compiler", [("nehalem", "x86_64"), ("forced", "x86_64"), ("aarch64",) * 2, ("s390x",) * 2]
)
def test_kernels_run_on_other_processors(processor, compiler, tmp_path):
    """They run without AVX, on ARM and on a big-endian processor. AVX2 is an illegal instruction without AVX."""
    for tool in (f"{compiler}-linux-gnu-g++", f"qemu-{compiler}"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    command = [sys.executable, str(ROOT / "tests" / "campaigns" / "processors.py"), processor]
    command += ["--inputs", "30", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


WORKS = "#!/bin/sh\n[ $1 = --list-gpu-code ] || exit 0\n"
OFFERED = f"{WORKS}echo sm_75 sm_80 sm_90 sm_90a"
OLD = "#!/bin/sh\necho nvcc fatal : \\'c++20\\' is not defined >&2; exit 1"
CPU_ALONE = "built for the CPU alone, without CUDA C++ kernels: "


@pytest.mark.parametrize(
    ("answer", "archs", "expected"),
    [
        (f"{WORKS}exit 3", "", "nvcc --list-gpu-code lists no architecture from 80 on"),
        (OLD, "", f"{CPU_ALONE}{{nvcc}} cannot compile C++20: nvcc fatal : 'c++20' is not defined"),
        ("\x7fELF of another machine", "", f"{CPU_ALONE}{{nvcc}} cannot be run: Exec format error"),
        (OFFERED, "", "('80', '90')"),
        (OFFERED, "90, 80 90", "('90', '80')"),
        (OFFERED, "75", "SGALIGN_CUDA_ARCHS must only contain 80, 90, got 75"),
        (OFFERED, "sm_90", "SGALIGN_CUDA_ARCHS must only contain 80, 90, got sm_90"),
        (OFFERED, "90a", "SGALIGN_CUDA_ARCHS must only contain 80, 90, got 90a"),
        (OFFERED, "120", "SGALIGN_CUDA_ARCHS must only contain 80, 90, got 120"),
    ],
)
def test_setup_checks_nvcc_and_the_architectures(tmp_path, answer, archs, expected):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(answer + "\n")
    compiler.chmod(0o755)
    code = """
import sys
from compilers import find_nvcc
sys.stderr = sys.stdout
try:
    print(tuple(find_nvcc(["g++"])[1]))
except SystemExit as error:
    print(error)
"""
    variables = {"CUDA_HOME": str(tmp_path), "SGALIGN_CUDA": "auto", "SGALIGN_CUDA_ARCHS": archs}
    said = run_python(code, ROOT / "csrc", **variables)
    assert expected.format(nvcc=compiler) in said


# ------------------------------------------------------------------------------------------------------ setup.py

STRANGE = "a b$c'd\"e#f:g&h(i)ü%\\"  # characters of a folder's name
# A fake compiler. It writes its arguments to a log, waits, and writes the output files of a compiler.
COMPILER = f"""#!{sys.executable}
import json, sys, time
from pathlib import Path
log = Path(__file__).with_name("log")
with log.open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "-o" in sys.argv:
    time.sleep(0.02)
    out = Path(sys.argv[sys.argv.index("-o") + 1])
    out.write_bytes(b"")
    if "-MF" in sys.argv:
        Path(sys.argv[sys.argv.index("-MF") + 1]).write_text(f"{{out}}: {{sys.argv[sys.argv.index('-c') + 1]}}\\n")
    with log.open("a") as file:
        file.write(json.dumps("done") + "\\n")
else:
    print("g++ that compiles nothing")
"""


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources in a folder with a strange name, and a compiler that only logs its arguments."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    folder = tmp_path / STRANGE / "sgalign"
    ignored = shutil.ignore_patterns("__pycache__", "_C.*", "build", "*.egg-info", ".*")
    for name in ("sgalign", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    compiler = tmp_path / STRANGE / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    (tmp_path / STRANGE / "tmp").mkdir()
    return folder


def run_setup(sources, *arguments, before="", **variables):
    """Run setup.py with the compiler in `sources`. Return its commands, without those of the probes."""
    code = f"""
import runpy, sys
{before}
sys.argv = {["setup.py", "-q", *arguments]!r}
runpy.run_path("setup.py", run_name="__main__")
"""
    beside = sources.parent
    environment = {"SGALIGN_CUDA": "0", "TMPDIR": str(beside / "tmp"), "CXX": shlex.quote(str(beside / "c++"))}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=sources,
        env=os.environ | environment | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (beside / "log").read_text().splitlines()]
    first = next(i for i, line in enumerate(lines) if "-c" in line)
    return lines[first:]


def test_build_passes_flags_on_and_works_in_any_folder(sources):
    flags = {
        "CPPFLAGS": "-DA='b c'",
        "CXXFLAGS": "-O1 -std=c++17",
        "LDFLAGS": "-L/x -Wl,-rpath,$ORIGIN",
        "MAX_JOBS": "1",
    }
    commands = run_setup(sources, "build_ext", **flags)
    assert commands[1::2] == ["done"] * (len(commands) // 2)  # one job at a time
    *compiled, linked = commands[::2]
    assert len(compiled) in (4, 10) and all(
        [word for word in words if word in ("-O3", "-O1", "-std=c++17", "-std=c++20")]
        == ["-O3", "-O1", "-std=c++17", "-std=c++20"]
        and "-DA=b c" in words
        for words in compiled
    )
    assert '-DSGALIGN_COMPILER="g++ that compiles nothing"' in compiled[0]
    assert "-L/x" in linked and "-Wl,-rpath,$ORIGIN" in linked
    assert (sources / "sgalign" / linked[linked.index("-o") + 1]).exists()


def outputs(commands):
    return [words[words.index("-o") + 1] for words in commands if "-c" in words or "-shared" in words]


def test_build_compiles_only_changed_files(sources):
    run_setup(sources, "build_ext")
    (sources.parent / "log").unlink()
    changed = sources / "csrc" / "cpu" / "alignment.cpp"
    changed.write_text(changed.read_text() + "// changed\n")
    os.utime(changed, (0, 0))  # older than the objects, as a file from an archive may be
    *compiled, linked = outputs(run_setup(sources, "build_ext"))
    assert {name.partition("_")[0] for name in compiled} == {"alignment", "bindings.o"} and linked.startswith("_C.")
    (sources.parent / "log").unlink()
    code = (
        "import runpy, sys; sys.argv = ['setup.py', '-q', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = os.environ | {"SGALIGN_CUDA": "0", "CXX": shlex.quote(str(sources.parent / "c++"))}
    subprocess.run([sys.executable, "-c", code], cwd=sources, env=environment, check=True, capture_output=True)
    assert not outputs(map(json.loads, (sources.parent / "log").read_text().splitlines()))


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a number, got many"),
        ({"CXXFLAGS": "-DA='b"}, "CXXFLAGS must be words for a shell, got -DA='b (No closing quotation)"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler cannot be run: No such file or directory: install g++ 11"),
        ({"CXXFLAGS": "--no-such-flag", "CXX": "g++"}, "g++ cannot compile C++20"),
    ],
)
def test_build_refuses_bad_variables_by_name(sources, variables, message):
    environment = os.environ | {"SGALIGN_CUDA": "0", "CXX": shlex.quote(str(sources.parent / "c++"))} | variables
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    result = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and f"sgalign: {message}" in result.stderr and "Traceback" not in result.stderr


def test_build_leaves_a_folder_unchanged_that_it_cannot_write_to(sources):
    def files():
        return sorted(str(path) for path in sources.rglob("*"))

    before = files()
    (sources.parent.parent / "tmp").mkdir()  # setuptools expands $ in this name
    variables = {"TMPDIR": str(sources.parent.parent / "tmp")}
    run_setup(sources, "bdist_wheel", "-d", "..", before="import os; os.access = lambda *_: False", **variables)
    assert files() == before
    (wheel,) = sources.parent.glob("*.whl")
    assert any(name.startswith("sgalign/_C.") for name in zipfile.ZipFile(wheel).namelist())
    assert not list((sources.parent.parent / "tmp").iterdir())


@pytest.mark.parametrize("missing", ["pybind11", "ninja"])
def test_build_says_which_package_is_missing(sources, missing):
    code = f"""
import runpy, sys
sys.modules[{missing!r}] = None
sys.argv = ["setup.py", "-q", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"a build without isolation needs {missing}: run `pip install 'setuptools>=77'" in result.stderr


def test_nvcc_passes_flags_with_commas_on():
    from_compilers = "from compilers import for_host; print(for_host(['-Wl,-rpath,/a b', '-g']))"
    said = run_python(from_compilers, ROOT / "csrc")
    assert said == str(["-Xcompiler='-Wl\\,-rpath\\,/a b'", "-Xcompiler=-g"])


@pytest.mark.slow
def test_core_built_in_a_folder_with_a_strange_name_works(sources):
    """No compiler, linker or ninja stumbles over a character."""
    environment = os.environ | {"SGALIGN_CUDA": "0", "TMPDIR": str(sources.parent / "tmp"), "CXXFLAGS": "-O1"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=sources, env=environment, check=True)
    assert run_python(USE, sources) == "fine\nfine"


# ------------------------------------------------------------------------------------------------------ imports


def test_package_can_be_imported_again():
    code = """
import sys
import torch
from torch.utils.flop_counter import FlopCounterMode
for _ in range(3):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sgalign"]:
        del sys.modules[name]
    import sgalign
    from sgalign.ops import attention
    x = torch.randn(1, 1, 2, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:  # uses the registered operations
        sgalign.fused_masked_attention(x, x, x, mask_ratio=0.5).sum().backward()
        sgalign.relation_alignment_loss(x[0, 0], x[0, 0]).backward()
        sgalign.fused_relation_logits(*x.new_ones(3, 2, 3), torch.zeros(2, 2, dtype=torch.int64), x.new_ones(4, 3))
    assert counter.get_total_flops() > 0
seen = []
attention.FORWARD["cpu"] = seen.append  # of the last import
torch.ops.sgalign.attention("cpu", [x], 1, x, x, None, None, None, 0.0, 0.0, 0, 1.0)
print(len(seen))
"""
    assert run_python(code) == "1"
