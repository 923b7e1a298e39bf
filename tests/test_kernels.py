"""The Triton kernels without a GPU: their results under Triton's interpreter, and what they compile to."""

import functools
import itertools
import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import compiled_kernels  # noqa: E402

from sgalign.ops import backends  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

INTERPRETED = """
import torch
from sgalign import kernels
from sgalign.ops import reference
from sgalign.kernels.random_mask import random_mask

for batch_heads, queries, keys in ((1, 1, 1), (2, 3, 257), (1, 2, 600), (0, 3, 4), (2, 0, 4), (2, 3, 0)):
    for seed, stream, threshold in (
        (0x123456789ABCDEF, 0, 0), (-1, 2**31 - 1, 20000), (-(2**63), 2**31 | 5, 65535), (7, 3, 65536)
    ):
        options = {"threshold": threshold, "seed": torch.tensor(seed), "stream": stream}
        expected = reference.random_mask(batch_heads, queries, keys, device=torch.device("cpu"), **options)
        mask = torch.empty_like(expected)
        random_mask(mask[None], **options)
        assert mask.dtype == torch.bool and torch.equal(mask, expected), (batch_heads, queries, keys, options)
print("equal")
"""


WHOLE_TILES = """
import torch
from sgalign import dual_branch_attention

torch.manual_seed(0)
for keys, shared in ((256, False), (64, True)):
    tensors = [torch.randn(1, 2, length, 32, requires_grad=True) for length in (20, 20, keys, keys)]
    tensors[1] = tensors[0] if shared else tensors[1]
    grads = [torch.randn(1, 2, 20, 32) for _ in range(2)]
    results = []
    for backend in ("triton", "reference"):
        outs = dual_branch_attention(*tensors, mask_ratio=0.3, mask_seed=1, scale=-0.2, backend=backend)
        results.append([*outs, *torch.autograd.grad(outs, tensors[shared:], grads)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
print("close")
"""


def run_interpreted(*arguments):
    if problem := backends.interpreter_problem():
        pytest.skip(problem)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "SGALIGN_TEST_BACKEND": "triton"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_interpreted_mask_is_the_definition():
    result = run_interpreted("-c", INTERPRETED)
    assert result.returncode == 0 and result.stdout.strip() == "equal", result.stderr


def test_whole_tiles_interpreted():
    """Without a mask, and with keys that fill their tiles, kernels ask for no bounds."""
    result = run_interpreted("-c", WHOLE_TILES)
    assert result.returncode == 0 and result.stdout.strip() == "close", result.stderr


@pytest.mark.parametrize("name", ["attention", "relation", "alignment"])
def test_operations_interpreted(name):
    """The operations' own tests, with Triton's kernels under its interpreter, which needs processes of its own."""
    result = run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py")
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 20


@pytest.mark.parametrize(
    "name",
    [
        "attention forward: fp16, 32 channels, two branches",
        "attention forward: fp32, 32 channels, one query for both branches",
        "attention query gradient: fp16, 32 channels, two branches",
        "attention key value gradient: fp16, 32 channels, two branches",
        "relation forward: bf16, 4096 channels, 51 classes, 2 branches",
        "relation gradients of weight and union: bf16, 4096 channels, 51 classes, 2 branches",
        "relation gradients of objects: bf16, 4096 channels, 51 classes, 2 branches",
        "alignment loss: fp32, 51 classes, softmax, symmetric",
    ],
)
def test_kernels_compile_and_fit_a_gpu(name, tmp_path, monkeypatch):
    """Compile for compute capability 9.0, which needs no GPU. Any version of Triton must pass."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    taken, assembly = compiled_kernels.resources(compiled_kernels.sources("sm_90")[name], "sm_90")
    assert taken.shared <= compiled_kernels.LARGEST_SHARED["sm_90"] and taken.registers <= 255
    assert "loss" in name or "MMA" in assembly, "no instruction of the matrix units"


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, name",
    [key[1:] for key in compiled_kernels.read_table() if key[0] == compiled_kernels.TRITON],
)
def test_compiled_kernels_take_no_more_than_the_table_says(target, name, tmp_path, monkeypatch):
    """Ahead of time, which needs no GPU: no registers spill, and nothing takes a tenth more than it did.

    By the installed version of Triton, where the table has its rows.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    expected = compiled_kernels.read_table()[compiled_kernels.TRITON, target, name]
    taken, assembly = compiled_kernels.resources(compiled_kernels.sources(target)[name], target)
    assert taken.spilled <= expected.spilled
    for figure in ("registers", "shared", "instructions", "loop"):
        assert getattr(taken, figure) <= 1.1 * getattr(expected, figure), figure
    if "sum of splits" not in name and "loss" not in name:
        assert re.search("MMA|mfma", assembly), "no instruction of the matrix units"


def test_shared_memory_is_there():
    from sgalign.kernels import configs

    limits = dict(compiled_kernels.LARGEST_SHARED)
    if "sm_80" not in configs.read_table():
        limits["sm_80"] = limits["sm_120"]  # the default, which 8.6 and 8.9 run too, and have less
    for (version, target, name), taken in compiled_kernels.read_table().items():
        assert taken.shared <= limits[target], (version, target, name)


@pytest.fixture
def compiled_for(monkeypatch):
    """What Triton would compile for a GPU: the kernel's name for each call of its compiler. Nothing is launched."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = []

    def compile_nothing(source, **options):
        names.append(source.fn.__name__)
        return types.SimpleNamespace(
            launch_metadata=lambda *arguments: None, run=lambda *arguments: None, function=None, packed_metadata=None
        )

    device = object()  # whose cache of compiled kernels is empty
    driver = types.SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr("triton.compiler.compile", compile_nothing)
    return names


def attend(queries, keys, dim=32, dtype=torch.float16, **options):
    """Both branches forward and backward through the kernels' launchers; returns nothing of worth."""
    from sgalign.kernels import attention
    from sgalign.ops.attention import Options

    rows = [torch.empty(1, 2, length, dim, dtype=dtype) for length in (queries, queries, keys, keys)]
    sums = [torch.empty(1, 2, queries) for _ in range(2)]
    padding = torch.zeros(1, keys, dtype=torch.bool)
    seed = torch.tensor(options.pop("seed", 0))
    drawn = {"mask_threshold": 6554, "dropout_threshold": 0, "stream": 0, "scale": 0.25} | options
    call = rows[:2], *rows[2:], rows[:2], sums, Options(None, padding, seed, **drawn)
    attention.forward(*call, multiprocessors=4)
    attention.backward(rows[:2], rows, *call, multiprocessors=4)


def test_seeds_streams_and_ratios_compile_nothing_anew(compiled_for):
    attend(100, 608)
    first = list(compiled_for)
    assert set(first) >= {"forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
    for seed, stream, threshold, scale in ((1, 1, 1, 1.0), (-(2**63), 2**31 - 1, 65536, 1e-6), (16, 16, 16, 16.0)):
        attend(100, 608, seed=seed, stream=stream, mask_threshold=threshold, scale=scale)
    assert compiled_for == first


def test_lengths_compile_a_handful_of_variants(compiled_for):
    """Strips of a tile, split keys or not, strides of a padding mask that are multiples of 16 or not."""
    lengths = (1, 2, 15, 16, 17, 31, 64, 100, 180, 255, 256, 257, 600, 608, 1000, 1024, 2049, 4096)
    for queries, keys in itertools.product(lengths, lengths):
        attend(queries, keys)
    counts = Counter(compiled_for)
    assert "merge_kernel" in counts and max(counts.values()) <= 10, counts


def test_programs_share_keys_where_that_fills_the_device():
    """On 132 multiprocessors: SGTR's queries of 8 images are 192 blocks, which fill it; those of 4 are 96."""
    from sgalign.kernels.attention import key_splits
    from sgalign.kernels.configs import Config

    plan = Config(64, 128, 4, 2)
    assert key_splits(plan, 2, 8 * 8 * 3, 8, 132) == (8, 1)
    assert key_splits(plan, 2, 4 * 8 * 3, 8, 132) == (4, 2)
    assert key_splits(plan, 2, 8 * 256, 256, 132) == (256, 1)
    assert key_splits(plan, 2, 4 * 8 * 3, 2, 132) == (2, 1)  # 100 keys: merging would take longer
    assert key_splits(Config(64, 64, 4, 3), 2, 2 * 8 * 2, 8, 132) == (2, 4)  # but not eight programs of one tile
    assert key_splits(plan, 2, 8 * 3, 0, 132) == (0, 1)
    for tiles in range(1, 40):
        span, splits = key_splits(plan, 1, 8 * 3, tiles, 132)
        assert (splits - 1) * span < tiles <= splits * span, "a split without a tile, or a tile without a split"


def test_float32_products_can_be_exact(monkeypatch):
    from sgalign.errors import InputError
    from sgalign.kernels import configs

    asked = "from sgalign.kernels import configs; print(configs.dot_precision())"
    for environment, expected in (({}, "tf32x3"), ({"SGALIGN_TRITON_DOT_PRECISION": "ieee"}, "ieee")):
        command = [sys.executable, "-c", asked]
        result = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
    monkeypatch.setattr(configs, "ASKED_PRECISION", "tf32")
    with pytest.raises(InputError, match="must be tf32x3 or ieee, got 'tf32'"):
        configs.dot_precision()


GOOD_TABLE = '{"default": {"forward": {"16 bits, 1 branch": {"64": [64, 64, 4, 2]}}}}'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "is not a table of configurations"),
        ("[]", "is not a table of configurations"),
        ("{}", "has no entry for forward with 16 bits, 1 branch and 32 channels"),
        (GOOD_TABLE.replace("16 bits", "8 bits"), "has no entry for forward with 16 bits, 1 branch and 32 channels"),
        (GOOD_TABLE.replace("64, 64", "64, 48"), "block_k must be a power of two of at least 16, got 48"),
        (GOOD_TABLE.replace("4, 2", '4, "2"'), "must be ints"),
        (GOOD_TABLE.replace('"64"', '"064"'), "channels must be an int, got '064'"),
        (GOOD_TABLE.replace(", 4, 2", ""), "is not a table of configurations"),
        (GOOD_TABLE.replace("4, 2", "4, 0"), "stages must be at least 1"),
        (GOOD_TABLE, None),
    ],
)
def test_bad_tables_are_named(tmp_path, monkeypatch, table, message):
    from sgalign.kernels import configs

    monkeypatch.setattr(configs, "TABLE", tmp_path / "configs.json")
    monkeypatch.setattr(configs, "read_table", functools.cache(configs.read_table.__wrapped__))
    configs.TABLE.write_text(table)
    lookup = functools.partial(configs.lookup.__wrapped__, "forward", "sm_90", 16, 32, 1, False)
    if message is None:
        assert lookup() == (64, 64, 4, 2, 0)
    else:
        with pytest.raises(ValueError, match=rf"configs\.json.*{message}"):
            lookup()


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
