"""The backend, device and dtypes for the operations' tests, and constants that several test files share.

The operations' tests run the compiled core unless SGALIGN_TEST_BACKEND names another backend. For example,
`SGALIGN_TEST_BACKEND=triton pytest tests/test_attention.py` runs Triton's kernels on a GPU, or on the CPU if
TRITON_INTERPRET=1 is set.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sgalign.ops import backends

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "import sys; from sgalign_command import main; sys.exit(main())"  # what the installed `sgalign` does
BACKEND = os.environ.get("SGALIGN_TEST_BACKEND", "cpu")
CASES_INTERPRETED = 2  # cases per test under Triton's interpreter, which takes seconds instead of milliseconds
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if BACKEND == "cpu" or INTERPRETED else "cuda"
EXACT = torch.float64 if BACKEND == "cpu" else torch.float32  # the dtype with the smallest error
DTYPES = [torch.float32, torch.float16]
if BACKEND == "cpu":
    DTYPES += [torch.bfloat16, torch.float64]
elif DEVICE == "cuda":
    DTYPES += [torch.bfloat16]  # not for Triton's interpreter, which multiplies the bit patterns of bfloat16 matrices

core_only = pytest.mark.skipif(BACKEND != "cpu", reason="tests the compiled core alone")
# flags of g++ for a core that reports accesses out of bounds and undefined behavior
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1"]


def _quicken_interpreter() -> None:
    """Make Triton's interpreter do two things only once, which otherwise take most of its time.

    It patches Triton's language at every call of a device function. Once per launch is enough for the functions of a
    module. It also looks up numpy's dtype of every number in a table that it makes anew each time.
    """
    from triton.runtime import interpreter

    launch, find_dtype = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[str] = set()
    dtypes: dict[str, Any] = {}

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    def known_dtype(triton_dtype: Any) -> Any:
        if triton_dtype.name not in dtypes:
            dtypes[triton_dtype.name] = find_dtype(triton_dtype)
        return dtypes[triton_dtype.name]

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = known_dtype


if DEVICE == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError(f"SGALIGN_TEST_BACKEND={BACKEND} needs a GPU, but torch finds none")
if INTERPRETED:
    if problem := backends.interpreter_problem():
        raise pytest.UsageError(problem)
    _quicken_interpreter()
