"""What the tests of the operations run: the compiled core, or, where SGALIGN_TEST_BACKEND says so, other kernels.

`SGALIGN_TEST_BACKEND=triton pytest tests/test_attention.py` runs Triton's on a GPU, with TRITON_INTERPRET=1 on the CPU.
"""

import os
from typing import Any

import pytest
import torch

from sgalign.ops import backends

BACKEND = os.environ.get("SGALIGN_TEST_BACKEND", "cpu")
CASES_INTERPRETED = 3  # of a test: what takes others milliseconds takes Triton's interpreter seconds
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if BACKEND == "cpu" or INTERPRETED else "cuda"
EXACT = torch.float64 if BACKEND == "cpu" else torch.float32  # the dtype with the smallest error
DTYPES = [torch.float32, torch.float16]
if BACKEND == "cpu":
    DTYPES += [torch.bfloat16, torch.float64]
elif DEVICE == "cuda":
    DTYPES += [torch.bfloat16]  # Triton's interpreter multiplies the bits of bfloat16 matrices

core_only = pytest.mark.skipif(BACKEND != "cpu", reason="of the compiled core alone")


def _quicken_interpreter() -> None:
    """Patches Triton's language once for the functions of a module in a launch.

    Its interpreter does so at every call of a device function, which is nine tenths of its time.
    """
    from triton.runtime import interpreter

    patched: set[str] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.InterpretedFunction.__call__ = call


if DEVICE == "cuda" and not torch.cuda.is_available():
    raise pytest.UsageError(f"SGALIGN_TEST_BACKEND={BACKEND} needs a GPU, torch finds none")
if INTERPRETED:
    if problem := backends.interpreter_problem():
        raise pytest.UsageError(problem)
    _quicken_interpreter()
