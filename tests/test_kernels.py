"""The Triton kernel without a GPU: its results under Triton's interpreter, and its compilation for CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sgalign

pytest.importorskip("triton")

INTERPRETED = """
import torch
from sgalign import kernels, reference
from sgalign.kernels.random_mask import random_mask

for batch_heads, queries, keys in ((1, 1, 1), (2, 3, 257), (1, 2, 600), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
    for seed in (0x123456789ABCDEF, -1, -(2**63)):
        for stream, threshold in ((0, 0), (2**31 - 1, 20000), (2**31 | 5, 65535), (3, 65536)):
            options = {"threshold": threshold, "seed": torch.tensor(seed), "stream": stream}
            expected = reference.random_mask(batch_heads, queries, keys, device=torch.device("cpu"), **options)
            mask = torch.empty_like(expected)
            random_mask(mask[None], **options)
            assert mask.dtype == torch.bool and torch.equal(mask, expected), (batch_heads, queries, keys, options)
print("equal")
"""


def test_interpreted_mask_is_the_definition():
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(sgalign.__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and result.stdout.strip() == "equal", result.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", ["i32", "i64"])
def test_compiles_for_cuda(capability, size, tmp_path, monkeypatch):
    """Ahead of time, which needs no GPU; sizes of 2**31 and more arrive as 64-bit numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sgalign.kernels.random_mask import random_mask_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"out": "*i1", "seed": "*i64", "queries": size, "keys": size, "stream": size, "threshold": "i32"}
    source = ASTSource(random_mask_kernel, signature, constexprs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
