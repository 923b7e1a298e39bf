"""Run the kernels for the CPU on other processors, which qemu emulates, and check the results.

Random cases are recorded with the compiled core: the memory and the arguments of each of its calls. A small program
without Python, processors.cpp, repeats the calls on each processor. The results then take the place of those of the
core and must be as accurate as these. Needs Linux on x86-64, qemu-user and the cross compilers, on Debian

    apt-get install --no-install-recommends qemu-user g++-aarch64-linux-gnu g++-riscv64-linux-gnu g++-s390x-linux-gnu
"""

from __future__ import annotations

import argparse
import runpy
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import core_checks as checks  # noqa: E402
import torch  # noqa: E402
from core_cases import CORE, Case, draw_case  # noqa: E402
from torch import Tensor  # noqa: E402

from sgalign.ops import _core  # noqa: E402

LIMITS = CORE._replace(odd=False, attention=CORE.attention[:2], relation=CORE.relation[:2])
OPERATIONS = (
    "attention_forward", "attention_backward", "random_mask", "relation_forward", "relation_backward", "alignment_loss"
)  # fmt: skip
INTEGER, NUMBER, ADDRESS = range(3)
FLAGS = ["-O3", "-std=c++20", "-static", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wl,--no-warnings"]
SETS = {  # instruction sets of setup.py: bytes of a vector and flags
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-uninitialized"]),
}


class Processor(NamedTuple):
    """A processor, the way to run a program on it, and the kernels that must run."""

    name: str
    compiler: str
    emulator: list[str]
    instruction_set: str | None = None  # that the program must choose; None if this depends on the machine
    forced: str = ""  # the instruction set that runs without being supported. It must end the program


PROCESSORS = {
    "native": Processor("this processor", "g++", []),
    "nehalem": Processor("x86-64, Nehalem of 2008", "g++", ["qemu-x86_64", "-cpu", "Nehalem"], "baseline"),
    "qemu64": Processor("x86-64, the oldest", "g++", ["qemu-x86_64", "-cpu", "qemu64"], "baseline"),
    "haswell": Processor("x86-64, Haswell of 2013", "g++", ["qemu-x86_64", "-cpu", "Haswell"], "avx2"),
    "forced": Processor("Nehalem with kernels for AVX2", "g++", ["qemu-x86_64", "-cpu", "Nehalem"], "avx2", "avx2"),
    "aarch64": Processor("aarch64", "aarch64-linux-gnu-g++", ["qemu-aarch64"], "baseline"),
    "riscv64": Processor("riscv64", "riscv64-linux-gnu-g++", ["qemu-riscv64"], "baseline"),
    "s390x": Processor("s390x, big-endian", "s390x-linux-gnu-g++", ["qemu-s390x"], "baseline"),
}


def main() -> None:
    """Run the processors that the command line names, or all, and print a table. End with status 1 on a defect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("processors", nargs="*", metavar="PROCESSOR", help=f"any of {', '.join(PROCESSORS)}")
    parser.add_argument("--inputs", type=int, default=2000, help="number of cases (default: 2000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the cases (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("build/processors"), help="folder (default: build/processors)")
    arguments = parser.parse_args()
    if unknown := set(arguments.processors) - set(PROCESSORS):
        parser.error(f"unknown processor: {', '.join(sorted(unknown))}; known: {', '.join(PROCESSORS)}")
    if arguments.inputs < 1:
        parser.error(f"--inputs must be at least 1, got {arguments.inputs}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [draw_case(arguments.seed, number, LIMITS) for number in range(arguments.inputs)]
    core = _core.load()
    core.use_instruction_set("baseline")
    expected = [checks.Expected(case) for case in cases]
    with Recorder(core, arguments.out / "calls") as recorder:
        for number, case in enumerate(cases):
            torch.set_num_threads(number % 2 + 1)
            checks.run(case, "cpu")
    failed = False
    print("| processor | kernels | cases | seconds | outcomes |\n|---|---|---|---|---|", flush=True)
    for name in arguments.processors or PROCESSORS:
        begin = time.monotonic()
        chosen, outcomes = outcomes_on(name, cases, expected, recorder, arguments.out)
        failed |= any("DEFECT" in word for word in outcomes)
        words = ", ".join(f"{count} {word}" if count > 1 else word for word, count in outcomes.most_common())
        columns = PROCESSORS[name].name, chosen, len(cases), f"{time.monotonic() - begin:.0f}", words
        print(f"| {' | '.join(map(str, columns))} |", flush=True)
    sys.exit(int(failed))


def outcomes_on(
    name: str, cases: list[Case], expected: list[checks.Expected], recorder: Recorder, out: Path
) -> tuple[str, Counter[str]]:
    """Return the instruction set that a processor used, and the outcomes of the cases."""
    processor, outcomes = PROCESSORS[name], Counter[str]()
    results = out / f"{name}.results"
    command = [*processor.emulator, build(processor.compiler, out), out / "calls", results]
    command += [processor.forced] if processor.forced else []
    done = subprocess.run(command, capture_output=True, text=True)
    chosen = done.stdout.strip()
    if processor.instruction_set not in (None, chosen):
        outcomes[f"DEFECT: the program chose {chosen or 'nothing'}"] += 1
    if processor.forced:
        ended = done.returncode == -signal.SIGILL
        outcomes["illegal instruction, as it must" if ended else f"DEFECT: status {done.returncode}"] += 1
        return chosen, outcomes
    if done.returncode:
        outcomes[f"DEFECT: status {done.returncode}: {done.stderr[-200:]}"] += 1
        return chosen, outcomes
    with Replay(recorder, results):
        for number, (case, wanted) in enumerate(zip(cases, expected)):
            torch.set_num_threads(number % 2 + 1)
            replayed = checks.run(case, "cpu")
            try:
                wanted.check(replayed)
                outcomes[type(case).__name__.lower()] += 1
            except AssertionError as error:
                outcomes["DEFECT AssertionError"] += 1
                (out / f"{name}-case-{number}.txt").write_text("".join(traceback.format_exception(error)))
    return chosen, outcomes


def build(compiler: str, out: Path) -> Path:
    """Compile the program that repeats calls with all kernels of a processor, and return its path."""
    program = out / f"processors-{compiler}"
    digest = runpy.run_path(str(ROOT / "sgalign" / "ops" / "_source_digest.py"))["source_digest"](ROOT / "csrc")
    sets = SETS if compiler == "g++" else {"baseline": SETS["baseline"]}
    defined = [f"-DSGALIGN_{name.upper()}" for name in sets]
    objects = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        for name, (width, flags) in sets.items():
            target = out / f"{compiler}-{source.stem}-{name}-{digest}.o"
            names = [f"-DSGALIGN_VECTOR_BYTES={width}", f"-DSGALIGN_KERNELS={source.stem}_{name}"]
            if not target.exists():
                subprocess.run([compiler, *FLAGS, *flags, *names, "-c", source, "-o", target], check=True)
            objects.append(target)
    driver = Path(__file__).with_suffix(".cpp")
    subprocess.run([compiler, *FLAGS, *defined, driver, *objects, "-o", program], check=True)
    return program


# ------------------------------------------------------------------------------------------------- calls of the core


class Stand:
    """A stand-in for the compiled core. It knows the memory behind every address that a call has."""

    def __init__(self, core: ModuleType) -> None:
        self.core = core
        self.memory: dict[int, Tensor] = {}
        self.find_address = Tensor.data_ptr

    def __enter__(self) -> Any:
        def data_ptr(tensor: Tensor) -> int:
            address = self.find_address(tensor)
            if address:
                self.memory[address] = tensor
            return address

        self.load, _core.load = _core.load, lambda: self  # type: ignore[assignment, return-value]
        Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: Any) -> None:
        _core.load = self.load
        Tensor.data_ptr = self.find_address  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Any:
        if name not in OPERATIONS:  # a description of a call, such as Attention
            return lambda *numbers: (name, numbers)
        return lambda *arguments: self.call(name, arguments)

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Handle a call. `arguments` are numbers, or one description."""
        raise NotImplementedError

    def buffers(self, numbers: Sequence[Any]) -> tuple[list[Tensor], dict[int, int]]:
        """Return the memory that a call may touch, as bytes, and the form of its addresses in the file of calls."""
        found: dict[int, Tensor] = {}
        addresses = {}
        for address in dict.fromkeys(number for number in numbers if type(number) is int and number in self.memory):
            tensor = self.memory[address]
            storage = tensor.untyped_storage()
            buffer = found.setdefault(storage.data_ptr(), tensor)
            place = list(found).index(storage.data_ptr()) + 1
            assert buffer.element_size() == tensor.element_size()
            addresses[address] = (place << 40) + address - storage.data_ptr()
        return list(found.values()), addresses

    @staticmethod
    def content(tensor: Tensor) -> Tensor:
        """Return all bytes of the memory of a tensor."""
        return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def numbers_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the numbers of a call."""
    return arguments[0][1] if isinstance(arguments[0], tuple) else arguments


class Recorder(Stand):
    """Writes every call to a file, then passes it to the core."""

    def __init__(self, core: ModuleType, path: Path) -> None:
        super().__init__(core)
        self.file: BinaryIO = open(path, "wb")

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        self.file.close()

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Write a call with the memory before it."""
        numbers = numbers_of(arguments)
        buffers, addresses = self.buffers(numbers)
        self.file.write(struct.pack("<2Q", OPERATIONS.index(name), len(buffers)))
        for tensor in buffers:
            content = self.content(tensor)
            self.file.write(struct.pack("<2Q", tensor.element_size(), len(content)) + content.numpy().tobytes())
        self.file.write(struct.pack("<Q", len(numbers)))
        for number in numbers:
            if isinstance(number, float):
                self.file.write(struct.pack("<Qd", NUMBER, number))
            elif number in addresses:
                self.file.write(struct.pack("<2Q", ADDRESS, addresses[number]))
            else:
                self.file.write(struct.pack("<Qq", INTEGER, number))
        self.memory.clear()
        if isinstance(arguments[0], tuple):
            kind, numbers = arguments[0]
            arguments = (getattr(self.core, kind)(*numbers),)
        getattr(self.core, name)(*arguments)


class Replay(Stand):
    """Answers the same calls in the same order with the results of another processor."""

    def __init__(self, recorder: Recorder, path: Path) -> None:
        super().__init__(recorder.core)
        self.file: BinaryIO = open(path, "rb")

    def __exit__(self, *_: Any) -> None:
        super().__exit__()
        assert not self.file.read(1), "there are results without a call"
        self.file.close()

    def call(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Put the memory after a call in its place."""
        for tensor in self.buffers(numbers_of(arguments))[0]:
            content = self.content(tensor)
            found = bytearray(self.file.read(len(content)))
            assert len(found) == len(content), "the results end early"
            if found:
                content.copy_(torch.frombuffer(found, dtype=torch.uint8))
        self.memory.clear()


if __name__ == "__main__":
    main()
