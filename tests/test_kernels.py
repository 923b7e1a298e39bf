"""Triton's kernels without a GPU: results under its interpreter, and resources of the compiled kernels."""

import functools
import itertools
import os
import re
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch
from target import ROOT

pytest.importorskip("triton")
import compiled_kernels  # noqa: E402

from sgalign.ops import backends  # noqa: E402

RANDOM_MASKS = """
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


def test_interpreted_mask_equals_the_definition():
    result = run_interpreted("-c", RANDOM_MASKS)
    assert result.returncode == 0 and result.stdout.strip() == "equal", result.stderr


def test_interpreted_whole_tiles_give_the_results_of_the_reference():
    """Kernels check no bounds if there is no mask and the keys fill their tiles."""
    result = run_interpreted("-c", WHOLE_TILES)
    assert result.returncode == 0 and result.stdout.strip() == "close", result.stderr


@pytest.mark.parametrize("name", ["attention", "relation", "alignment"])
def test_interpreted_operations_pass_their_tests(name):
    """Triton's interpreter needs a separate process."""
    result = run_interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py")
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 20


@pytest.mark.parametrize(
    "name",
    [
        "attention forward: fp16, 32 channels, two branches",
        "attention query gradient: fp16, 32 channels, two branches",
        "attention key value gradient: fp16, 32 channels, two branches",
        "relation forward: bf16, 4096 channels, 51 classes, 2 branches",
        "relation gradients of weight and union: bf16, 4096 channels, 51 classes, 2 branches",
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
    """The kernels are compiled ahead of time, which needs no GPU.

    They spill no more registers than in the table, and no figure is more than a tenth larger. There are cases only if
    the table has rows for the installed version of Triton.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    expected = compiled_kernels.read_table()[compiled_kernels.TRITON, target, name]
    taken, assembly = compiled_kernels.resources(compiled_kernels.sources(target)[name], target)
    assert taken.spilled <= expected.spilled
    for figure in ("registers", "shared", "instructions", "loop"):
        assert getattr(taken, figure) <= 1.1 * getattr(expected, figure), figure
    if "sum of splits" not in name and "loss" not in name:
        assert re.search("MMA|mfma", assembly), "no instruction of the matrix units"


def test_kernels_of_the_table_fit_the_shared_memory():
    from sgalign.kernels import configs

    limits = dict(compiled_kernels.LARGEST_SHARED)
    if "sm_80" not in configs.read_table():
        limits["sm_80"] = limits["sm_120"]  # 8.6 and 8.9 use this default, too, and have less shared memory
    for (version, target, name), taken in compiled_kernels.read_table().items():
        assert taken.shared <= limits[target], (version, target, name)


@pytest.fixture
def compiled_for(monkeypatch):
    """The kernel names for which Triton called its compiler for a GPU. Nothing is compiled or launched."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = []

    def compile_nothing(source, **options):
        names.append(source.fn.__name__)
        return types.SimpleNamespace(
            launch_metadata=lambda *arguments: None, run=lambda *arguments: None, function=None, packed_metadata=None
        )

    device = object()  # a new device, for which Triton has no compiled kernels
    driver = types.SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr("triton.compiler.compile", compile_nothing)
    return names


def attend(queries, keys, dim=32, dtype=torch.float16, **options):
    """Launch the kernels of both branches, forward and backward. The results do not matter."""
    from sgalign.kernels import attention
    from sgalign.ops._attention_arguments import Options

    rows = [torch.empty(1, 2, length, dim, dtype=dtype) for length in (queries, queries, keys, keys)]
    sums = [torch.empty(1, 2, queries) for _ in range(2)]
    padding = torch.zeros(1, keys, dtype=torch.bool)
    seed = torch.tensor(options.pop("seed", 0))
    drawn = {"mask_ratio": 0.1, "dropout_p": 0.0, "stream": 0, "scale": 0.25} | options
    call = rows[:2], *rows[2:], rows[:2], sums, Options(None, padding, seed, **drawn)
    attention.forward(*call, multiprocessors=4)
    attention.backward(rows[:2], rows, *call, multiprocessors=4)


def test_seeds_streams_and_ratios_compile_nothing_again(compiled_for):
    attend(100, 608)
    first = list(compiled_for)
    assert set(first) >= {"forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"}
    for seed, stream, threshold, scale in ((1, 1, 1, 1.0), (-(2**63), 2**31 - 1, 65536, 1e-6), (16, 16, 16, 16.0)):
        attend(100, 608, seed=seed, stream=stream, mask_ratio=threshold / 65536, scale=scale)
    assert compiled_for == first


def test_lengths_compile_at_most_ten_variants_of_a_kernel(compiled_for):
    """Variants differ in strips of a tile, split keys, and strides of a padding mask that are multiples of 16."""
    lengths = (1, 2, 15, 16, 17, 31, 64, 100, 180, 255, 256, 257, 600, 608, 1000, 1024, 2049, 4096)
    for queries, keys in itertools.product(lengths, lengths):
        attend(queries, keys)
    counts = Counter(compiled_for)
    assert "merge_kernel" in counts and max(counts.values()) <= 10, counts


def test_keys_are_split_if_there_are_too_few_programs():
    """SGTR's queries are 192 blocks for 8 images, which fill 132 multiprocessors, and 96 blocks for 4 images."""
    from sgalign.kernels.attention import key_splits
    from sgalign.kernels.configs import Config

    plan = Config(64, 128, 4, 2)
    assert key_splits(plan, 2, 8 * 8 * 3, 8, 132) == (8, 1)
    assert key_splits(plan, 2, 4 * 8 * 3, 8, 132) == (4, 2)
    assert key_splits(plan, 2, 8 * 256, 256, 132) == (256, 1)
    assert key_splits(plan, 2, 4 * 8 * 3, 2, 132) == (2, 1)  # 100 keys, for which merging would take longer
    assert key_splits(Config(64, 64, 4, 3), 2, 2 * 8 * 2, 8, 132) == (2, 4)  # rather than eight programs of one tile
    assert key_splits(plan, 2, 8 * 3, 0, 132) == (0, 1)
    for tiles in range(1, 40):
        span, splits = key_splits(plan, 1, 8 * 3, tiles, 132)
        assert (splits - 1) * span < tiles <= splits * span, "a split without a tile, or a tile without a split"


def test_environment_sets_the_precision_of_float32_products():
    asked = "from sgalign.kernels import configs; print(configs.dot_precision())"
    environment = os.environ | {"SGALIGN_TRITON_DOT_PRECISION": "ieee"}
    result = subprocess.run([sys.executable, "-c", asked], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "ieee", result.stderr


def test_float32_products_are_three_of_tf32_by_default(monkeypatch):
    from sgalign.kernels import configs

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "SGALIGN_TRITON_DOT_PRECISION" in os.environ:
        pytest.skip("the environment sets another precision")
    assert configs.dot_precision() == "tf32x3"


def test_unknown_precision_is_refused(monkeypatch):
    from sgalign.errors import InputError
    from sgalign.kernels import configs

    monkeypatch.setattr(configs, "ASKED_PRECISION", "tf32")
    with pytest.raises(InputError, match="must be tf32x3 or ieee, got 'tf32'"):
        configs.dot_precision()


@pytest.fixture
def looked_up(tmp_path, monkeypatch):
    """A function that returns the plan for 32 channels from a table in a file."""
    from sgalign.kernels import configs

    monkeypatch.setattr(configs, "TABLE", tmp_path / "configs.json")
    monkeypatch.setattr(configs, "read_table", functools.cache(configs.read_table.__wrapped__))

    def look_up(table):
        configs.TABLE.write_text(table)
        return configs.lookup.__wrapped__("forward", "sm_90", 16, 32, 1, False)

    return look_up


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
    ],
)
def test_bad_tables_are_refused_by_the_name_of_their_file(looked_up, table, message):
    with pytest.raises(ValueError, match=rf"configs\.json.*{message}"):
        looked_up(table)


def test_good_table_gives_the_plan_of_the_next_size(looked_up):
    assert looked_up(GOOD_TABLE) == (64, 64, 4, 2, 0)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size", ["i32", "i64"])
def test_random_mask_compiles_for_cuda(capability, size, tmp_path, monkeypatch):
    """The kernel is compiled ahead of time, which needs no GPU. Sizes of 2**31 and more are 64-bit numbers."""
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
