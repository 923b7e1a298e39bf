"""Tests of the CUDA C++ kernels without a GPU. The same sources are compiled for the CPU with host_primitives.h.

These tests do not cover a GPU's own arithmetic and memory model. The emulation reports threads of a block that depend
on one another without a barrier, on shared memory that was never written, or on the order of warps. See docs/cuda.md.
"""

import ctypes
import functools
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import cuda_resources as resources
import pytest
import test_alignment as alignment
import test_attention as attention
import test_relation as relation
import torch
from covers import cover
from target import ROOT, SANITIZE
from torch.nn import functional

from sgalign import random_attention_mask, relation_alignment_loss
from sgalign.ops import _core, _cuda, backends, reference
from sgalign.ops._attention_backends import Call, Options, _description
from sgalign.ops._source_digest import source_digest

TYPES = {"attention_forward": ["Half", "BFloat16", "float"], "attention_backward": ["Half", "BFloat16", "float"]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def build(folder, *flags):
    """Compile a core in which the emulation runs the CUDA kernels on the CPU, and return its path."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 builds the module")
    if not shutil.which("g++") or os.uname().machine != "x86_64":
        pytest.skip("the kernels' emulation needs g++ on x86-64")
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / "_C.so"
    if module.exists():
        return module
    command = ["g++", *FLAGS, *flags, f"-I{ROOT / 'tests' / 'cuda'}"]
    names = ("SGALIGN_SOURCES", "SGALIGN_COMPILER", "SGALIGN_CUDA_ARCHS")
    bindings = [f'-D{name}="emulated"' for name in names] + ["-DSGALIGN_CUDA", "-O0"]
    bindings += [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    sources = [(ROOT / "csrc" / "bindings.cpp", bindings), (ROOT / "tests" / "cuda" / "host_module.cpp", [])]
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        sources += [(source, ["-x", "c++", f"-DSGALIGN_TYPE={name}"]) for name in TYPES.get(source.stem, [""])]
    objects = []
    for i, (source, own) in enumerate(sources):
        objects.append(folder / f"{os.getpid()}.{i}.o")  # another process may build at the same time
        subprocess.run([*command, *own, "-c", source, "-o", objects[-1]], check=True)
    partial = module.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-shared", *objects, "-o", partial], check=True)
    os.replace(partial, module)
    return module


def digest():
    return source_digest(ROOT / "csrc") + source_digest(ROOT / "tests" / "cuda")


@pytest.fixture(scope="session")
def library():
    """The path of the emulated core, which is built once for these sources."""
    path = os.environ.get("SGALIGN_EMULATED_CORE")
    return Path(path) if path else build(ROOT / "build" / f"emulated-{digest()}", "-Og")


@pytest.fixture(scope="session")
def emulated(library):
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def core(emulated, monkeypatch, poisoned):
    """The emulated core, which the package uses. Elements that the kernels do not write stay NaN."""
    monkeypatch.setattr(_core, "load", lambda: emulated)
    return emulated


# ------------------------------------------------------------------------------------------------------- primitives


@pytest.fixture(scope="session")
def primitives(library, emulated):
    loaded = ctypes.CDLL(str(library))

    def call(name, *arguments, size):
        """Return the 32-bit words that a primitive gives each lane."""
        out = torch.zeros(32, size, dtype=torch.int32)
        pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(loaded, name)(*pointers, ctypes.c_void_p(out.data_ptr()))
        return out

    call.library = loaded
    return call


def elements_of_a(dtype, lane, i):
    """Return row and column of element i of a lane, from the PTX manual's tables for A.

    The tables are those of mma.m16n8k16 and, for tf32, of mma.m16n8k8.
    """
    group, member = lane >> 2, lane % 4
    if dtype == torch.float32:
        return group + 8 * (i in (1, 3)), member + 4 * (i in (2, 3))
    return group + 8 * (i in (2, 3, 6, 7)), member * 2 + (i & 1) + 8 * (i >= 4)


def elements_of_b(dtype, lane, i):
    group, member = lane >> 2, lane % 4
    if dtype == torch.float32:
        return member + 4 * i, group
    return member * 2 + (i & 1) + 8 * (i >= 2), group


def elements_of_accumulators(lane, i):
    return (lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_mma_follows_the_tables_of_the_ptx_manual(dtype, primitives):
    depth, per_word = (8, 1) if dtype == torch.float32 else (16, 2)
    generator = torch.Generator().manual_seed(0)
    # Sums of small integers are exact, so any element in a wrong place shows.
    a, b, c = (torch.randint(-9, 10, size, generator=generator).float() for size in ((16, depth), (depth, 8), (16, 8)))
    words = torch.zeros(32, 10, dtype=torch.int32)
    for lane in range(32):
        left = torch.stack([a[elements_of_a(dtype, lane, i)] for i in range(4 * per_word)]).to(dtype)
        right = torch.stack([b[elements_of_b(dtype, lane, i)] for i in range(2 * per_word)]).to(dtype)
        sums = torch.stack([c[elements_of_accumulators(lane, i)] for i in range(4)])
        words[lane] = torch.cat([left.view(torch.int32), right.view(torch.int32), sums.view(torch.int32)])
    out = primitives("run_mma", [torch.float16, torch.bfloat16, torch.float32].index(dtype), words, size=4)
    result = torch.full((16, 8), math.nan)
    for lane in range(32):
        for i, value in enumerate(out[lane].view(torch.float32)):
            result[elements_of_accumulators(lane, i)] = value
    assert torch.equal(result, a @ b + c)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_follows_the_ptx_manual(transposed, primitives):
    """Lane T has elements 2 * (T % 4) and 2 * (T % 4) + 1 of row T / 4 of each matrix."""
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = primitives("run_load_matrices", int(transposed), matrices, size=4).view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            matrix = matrices[m].t() if transposed else matrices[m]
            assert torch.equal(out[lane, m], matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2])


@pytest.fixture(scope="session")
def converted(primitives):
    """Rows of 32 numbers, one for each lane, each with the seven words that `run_convert` gives each lane."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 32, generator=generator) * 10.0 ** torch.randint(-9, 6, (64, 32), generator=generator)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 65504, 65519.9, 65520]
    special += [6e-8, 2.9e-8, 2.98e-8, 6.1e-5, 2049, 2051]
    values[0, : len(special)] = torch.tensor(special)
    return [(row, primitives("run_convert", row.contiguous(), size=7)) for row in values]


def as_floats(words):
    return words.contiguous().view(torch.float32)


def test_pairs_of_16_bits_are_rounded_as_by_torch(converted):
    for row, out in converted:
        for word, dtype in ((0, torch.float16), (1, torch.bfloat16)):
            pairs = out[:, word].contiguous().view(dtype).view(32, 2)
            torch.testing.assert_close(pairs, torch.stack([row, -row], 1).to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(as_floats(out[:, 2]), row.half().float(), rtol=0, atol=0, equal_nan=True)


def test_tf32_is_rounded_to_ten_bits(converted):
    for row, out in converted:
        finite = row.isfinite()
        assert ((as_floats(out[:, 3]) - row).abs() <= row.abs() * 2.0**-11)[finite].all()
        assert not (out[:, 3] & 0x1FFF)[finite].any()


def test_shuffle_exchanges_the_numbers_of_lanes(converted):
    for row, out in converted:
        exchanged = row[torch.arange(32) ^ 5]
        torch.testing.assert_close(as_floats(out[:, 4]), exchanged, rtol=0, atol=0, equal_nan=True)


def test_ballot_gives_all_lanes_the_votes_of_all_lanes(converted):
    for row, out in converted:
        votes = sum(int(value > 0) << i for i, value in enumerate(row))
        assert {int(word) & 0xFFFFFFFF for word in out[:, 5]} == {votes}


def test_exp2_is_exact_to_21_bits_and_flushes_subnormals(converted):
    for row, out in converted:
        powers = row.double().exp2().float()
        powers[powers < 2.0**-126] = 0
        torch.testing.assert_close(as_floats(out[:, 6]), powers, rtol=2.0**-21, atol=0, equal_nan=True)


MISTAKES = ["", "race", "race", "race", "diverge", "diverge", "NaN", "not waited for", "not a multiple of 16", "race"]


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
def test_emulation_reports_mistakes(mistake, primitives):
    expected = MISTAKES[mistake]
    if expected == "race" and not os.environ.get("SGALIGN_EMULATED_CORE", "").endswith("race/_C.so"):
        pytest.skip("only the slow tests look for races")
    message = ctypes.create_string_buffer(200)
    source, out = torch.ones(4, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, out)]
    primitives.library.run_mistake(mistake, *pointers, message)
    if expected == "NaN":
        expected = ""
        assert (out == -1).all()
    assert (expected in message.value.decode()) if expected else not message.value


# -------------------------------------------------------------------------------------------------------- attention

SHAPES = [(2, 3, 17, 33, 8), (1, 2, 5, 7, 3), (1, 2, 40, 300, 32), (1, 1, 70, 270, 64), (1, 2, 9, 260, 20)]
SHAPES += [(1, 1, 3, 65, 256), (1, 1, 35, 100, 128)]


assert_accurate = functools.partial(attention.assert_accurate, backend="cuda")


@pytest.mark.parametrize("shape, branches, dtype", cover(SHAPES, attention.BRANCHES, DTYPES), ids=str)
def test_attention_is_accurate(shape, branches, dtype, core):
    assert_accurate(branches, *attention.make(shape, dtype), **attention.make_options("all", shape))


@pytest.mark.parametrize(
    "branches, options, dtype",
    cover(attention.BRANCHES, ["none", "random", "mask", "padding", "dropout"], [torch.float32, torch.float16]),
    ids=str,
)
def test_attention_is_accurate_with_each_option(branches, options, dtype, core):
    shape = (2, 2, 19, 70, 16)
    assert_accurate(branches, *attention.make(shape, dtype), **attention.make_options(options, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 6, 1000])
def test_keys_in_parts_are_accurate(multiprocessors, dtype, core, monkeypatch):
    """The keys are split into parts if there are too few rows to keep a GPU busy."""
    monkeypatch.setattr(_cuda, "multiprocessors", lambda device: multiprocessors)
    shape = (1, 1, 5, 1100, 16)
    tensors, grad_outs = attention.make(shape, dtype)
    options = attention.make_options("all", shape)
    options["key_padding_mask"][:, 200:900] = True  # some parts have no kept entry
    for branches in attention.BRANCHES:
        assert_accurate(branches, tensors, grad_outs, **options)


@pytest.mark.parametrize("layout", ["projection", "slice", "every other channel", "one batch", "one number"])
def test_layout_of_attention_changes_no_bit(layout, core):
    """Rows are copied element by element if their distance is not a multiple of 16 bytes."""
    shape = (2, 3, 20, 70, 12)
    for dtype in (torch.float32, torch.float16):
        tensors, grad_outs = ([attention.LAYOUTS[layout](t) for t in ts] for ts in attention.make(shape, dtype))
        contiguous = ([tensor.contiguous() for tensor in ts] for ts in (tensors, grad_outs))
        options = attention.make_options("all", shape) | {"backend": "cuda"}
        result = attention.run("dual", tensors, grad_outs, **options)
        attention.assert_same(result, attention.run("dual", *contiguous, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bytes_after_the_channels_are_not_read(dtype, core):
    """Rows are a multiple of 16 bytes apart, but their channels are not a multiple of 16 bytes."""
    tensors, grad_outs = attention.make((1, 2, 20, 70, 18), dtype)
    wide = [[functional.pad(t, (0, 6), value=math.nan)[..., :18] for t in ts] for ts in (tensors, grad_outs)]
    options = {"mask_ratio": 0.3, "mask_seed": 5, "backend": "cuda"}
    attention.assert_same(attention.run("dual", *wide, **options), attention.run("dual", tensors, grad_outs, **options))


@pytest.mark.parametrize("branches", attention.BRANCHES)
def test_rows_without_a_kept_entry_give_zeros(branches, core):
    """Mask and padding drop all entries of rows 0 to 4, and a mask ratio of 1 drops all entries of the mirror."""
    shape = (2, 2, 14, 300, 8)
    tensors, grad_outs = attention.make(shape)
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[:, 100:] = True
    mask = torch.zeros(14, 300, dtype=torch.bool)
    mask[:5, :100] = True
    options = {"mask": mask, "key_padding_mask": padding, "mask_seed": 5}
    assert_accurate(branches, tensors, grad_outs, mask_ratio=0.3, **options)
    outs, grads = attention.run(branches, tensors, grad_outs, mask_ratio=1, backend="cuda", **options)
    assert not outs[-1].any() and not outs[0][:, :, :5].any() and not grads[0][:, :, :5].any()


@pytest.mark.parametrize("options", ["all", "random"])
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_negative_scales_and_scale_0_are_accurate(dtype, scale, options, core):
    shape = (1, 2, 19, 70, 16)
    tensors, grad_outs = attention.make(shape, dtype)
    for branches in attention.BRANCHES:
        options_of = attention.make_options(options, shape)
        assert_accurate(branches, tensors, grad_outs, floor=1.0, scale=scale, **options_of)


@pytest.mark.parametrize("branches", attention.BRANCHES)
def test_padded_scores_far_above_the_kept_ones_cost_no_accuracy(branches, core):
    """The score of a padded key is 0 here, and the scores of the kept keys are far below."""
    shape = (1, 1, 30, 70, 16)
    tensors, grad_outs = attention.make(shape, torch.float16)
    tensors[0][..., 0] = tensors[1][..., 0] = 16
    tensors[2][..., 0] = -16
    options = attention.make_options("padding", shape)
    assert_accurate(branches, tensors, grad_outs, scale=1.0, **options)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padded_keys_and_values_leak_nowhere(dtype, junk, core):
    shape = (2, 2, 14, 90, 8)
    tensors, grad_outs = attention.make(shape, dtype)
    options = attention.make_options("all", shape) | {"backend": "cuda"}
    padding = options["key_padding_mask"]
    expected = attention.run("dual", tensors, grad_outs, **options)
    for tensor in tensors[2:]:
        tensor[padding[:, None].expand(tensor.shape[:3])] = junk
    result = attention.run("dual", tensors, grad_outs, **options)
    attention.assert_same(result, expected)
    for grad in result[1][2:]:
        assert not grad[padding[:, None].expand(grad.shape[:3])].any()


def test_nan_in_a_kept_key_reaches_the_outputs(core, monkeypatch):
    tensors, _ = attention.make((1, 1, 3, 600, 4))
    tensors[2][0, 0, 570, 1] = math.nan
    for multiprocessors in (1, 8):
        monkeypatch.setattr(_cuda, "multiprocessors", lambda device, count=multiprocessors: count)
        assert all(out.isnan().all() for out in attention.attend("dual", tensors, backend="cuda"))


@pytest.mark.parametrize("gap", [20, 60, 200])
@pytest.mark.parametrize("branches", attention.BRANCHES)
def test_dropped_score_far_above_the_kept_ones_costs_no_accuracy(branches, gap, core):
    """The supervised maximum is `gap` above all scores that the mirror keeps."""
    tensors, grad_outs = attention.make((1, 1, 30, 70, 8))
    dropped = reference.random_mask(
        1, 30, 70, threshold=round(0.3 * 65536), seed=torch.tensor(11), stream=0, device=torch.device("cpu")
    )[0, :, 40]
    tensors[0][..., 0] = tensors[1][..., 0] = 1
    tensors[2][..., 0] = 0
    tensors[2][..., 40, :] = 0
    tensors[2][..., 40, 0] = gap
    grad_outs = [grad_outs[0] * 0, grad_outs[1] * dropped[:, None]][branches == "single" :]
    assert_accurate(branches, tensors, grad_outs, mask_ratio=0.3, mask_seed=11, scale=1.0)


@pytest.mark.parametrize("branches", attention.BRANCHES)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0)])
def test_empty_attention_gives_zeros(shape, branches, core):
    tensors, grad_outs = attention.make(shape)
    result = attention.run(branches, tensors, grad_outs, backend="cuda", **attention.make_options("all", shape))
    for tensor in (*result[0], *result[1]):
        assert tensor is None or not tensor.any()


def test_attention_is_the_same_on_each_run(core):
    shape = (1, 2, 33, 100, 16)
    tensors, grad_outs = attention.make(shape)
    options = attention.make_options("all", shape) | {"backend": "cuda"}
    attention.assert_same(
        attention.run("dual", tensors, grad_outs, **options), attention.run("dual", tensors, grad_outs, **options)
    )


def test_attention_is_the_same_in_branches_of_equal_queries(core):
    tensors, _ = attention.make((1, 2, 33, 100, 16))
    tensors[1] = tensors[0].clone()
    for branches in ("dual", "same query"):
        out, mirrored_out = attention.attend(branches, tensors, backend="cuda", dropout_p=0.5, mask_seed=3)
        assert torch.equal(out, mirrored_out)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 5, 257), (1, 2, 3, 600), (2, 2, 0, 4), (2, 2, 4, 0)])
def test_random_mask_equals_the_definition(size, core, monkeypatch):
    choose = backends.choose
    for seed in (0x123456789ABCDEF, -1, -(2**63)):
        for stream, ratio in ((0, 0), (2**31 - 1, 0.3), (5, 65535 / 65536), (3, 1)):
            monkeypatch.setattr(backends, "choose", lambda *_: "cuda")
            mask = random_attention_mask(*size, ratio=ratio, seed=seed, stream=stream)
            monkeypatch.setattr(backends, "choose", choose)
            batch, heads, queries, keys = size
            expected = reference.random_mask(
                batch * heads, queries, keys, threshold=round(65536 * ratio), seed=torch.tensor(seed), stream=stream,
                device=torch.device("cpu"),
            )  # fmt: skip
            assert torch.equal(mask.flatten(0, 1), expected)


# ------------------------------------------------------------------------------------------- relations and alignment


@pytest.mark.parametrize(
    "shape, branches, dtype",
    cover([*relation.SHAPES, (6, 70, 40, 70), (3, 0, 40, 5), (70, 30, 64, 3)], (1, 2), DTYPES),
    ids=str,
)
def test_relation_is_accurate_and_the_same_on_each_run(shape, branches, dtype, core):
    union, pairs, operands, grads = relation.make(shape, dtype, bias=shape[0] != 5)
    operands, grads = operands[:branches], grads[:branches]
    ours = relation.assert_accurate(union, pairs, operands, grads, "cuda")
    for mine, again in zip(ours, relation.run(union, pairs, operands, grads, "cuda")):
        assert all(torch.equal(a, b) for a, b in zip(mine, again))


@pytest.mark.parametrize("shape", [(9, 60, 128, 51), (4, 7, 18, 2)], ids=str)
@pytest.mark.parametrize("around", [(1, 2), (0, 6)])
def test_strides_of_relation_change_no_bit(around, shape, core):
    """With `around` (0, 6), rows of 18 channels are a multiple of 16 bytes apart, but their length is not."""
    union, pairs, operands, grads = relation.make(shape)
    before, behind = around

    def shifted(tensor):
        return None if tensor is None else functional.pad(tensor, around, value=math.nan)[..., before:-behind]

    expected = relation.run(union, pairs, operands, grads, "cuda")
    strided = shifted(union), pairs.t().contiguous().t(), [[shifted(t) for t in branch] for branch in operands]
    for mine, theirs in zip(relation.run(*strided, grads, "cuda"), expected):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_alignment_equals_the_reference(kind, direction, core):
    generator = torch.Generator().manual_seed(0)
    for relations, classes in ((7, 5), (9, 51), (1, 200), (0, 3)):
        for dtype in DTYPES:
            teacher, student = (torch.randn(2, relations, classes, generator=generator) * 3).to(dtype)
            for weight in (None, torch.rand(relations, generator=generator).round(decimals=1)):
                results = []
                for backend, cast in (("cuda", dtype), ("reference", torch.float64)):
                    leaf = student.detach().clone().to(cast).requires_grad_()
                    loss = relation_alignment_loss(
                        teacher.to(cast), leaf, kind=kind, direction=direction, weight=weight, backend=backend
                    )
                    loss.backward()
                    results.append((loss, leaf.grad))
                (loss, grad), (expected, expected_grad) = results
                torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
                if grad.numel():
                    tolerance = 2 * torch.finfo(dtype).eps * expected_grad.abs().max().item() + 1e-7
                    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_alignment_of_equal_extreme_logits_is_zero(kind, direction, core):
    teacher = torch.tensor(alignment.EXTREME)
    student = teacher.clone().requires_grad_()
    loss = relation_alignment_loss(teacher, student, kind=kind, direction=direction, backend="cuda")
    loss.backward()
    assert loss == 0 and student.grad.abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("direction", ["teacher_to_student", "symmetric"])
def test_alignment_of_opposite_extreme_logits_is_finite(kind, direction, core):
    teacher = torch.tensor(alignment.EXTREME)
    student = (-teacher).requires_grad_()
    loss = relation_alignment_loss(teacher, student, kind=kind, direction=direction, backend="cuda")
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_alignment_has_finite_gradients_if_the_teacher_excludes_a_class(kind, core):
    infinite = torch.tensor([[0.0, -math.inf, 1]])
    student = torch.tensor([[0.0, 1, 2]], requires_grad=True)
    relation_alignment_loss(infinite, student, kind=kind, backend="cuda").backward()
    assert student.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------- errors


def test_error_of_a_launch_names_kernel_and_shape(emulated, core):
    rows = torch.ones(1, 1, 1, 8).expand(2**31, 1, 1, 8)
    options = Options(None, None, None, 0, 0, 0, 1.0)
    call = _description(emulated, Call([rows], rows, rows, [rows], [rows], options))
    with pytest.raises(
        RuntimeError, match="attention of B, H, Lq, Lk, D = 2147483648 1 1 1 8: .* blocks exceed the limits of a grid"
    ):
        emulated.cuda_attention_forward(call, 0, 1, 0, (0, 0))


def test_float64_is_refused(core):
    tensors, _ = attention.make((1, 1, 3, 4, 5), torch.float64)
    with pytest.raises(ValueError, match="backend 'cuda' does not support float64"):
        attention.attend("dual", tensors, backend="cuda")


def test_default_on_a_gpu_is_triton_or_these_kernels(core, monkeypatch):
    """The default is Triton if it is installed, otherwise these kernels. Neither supports float64."""
    gpu = torch.device("cuda")
    assert backends.choose("cuda", gpu, torch.float16) == "cuda"
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    assert backends.choose(None, gpu, torch.float32) == "triton"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert backends.choose(None, gpu, torch.float32) == "cuda"
    assert backends.choose(None, gpu, torch.float64) == "reference"


def test_error_of_a_core_without_cuda_says_how_to_build_it(monkeypatch):
    class Core:
        pass

    monkeypatch.setattr(_core, "load", Core)
    tensors, _ = attention.make((1, 1, 3, 4, 5))
    with pytest.raises(ImportError, match="backend 'cuda' cannot be used: .* built without CUDA: put nvcc on PATH"):
        attention.attend("dual", tensors, backend="cuda")


# -------------------------------------------------------------------------------------------------------- resources


# kernels that spill two to eight registers
SPILLS = "attention_forward_kernel<float, 256,", "attention_grad_query_kernel<float, 256,"


def test_registers_and_stack_match_the_table():
    """In the built core, only the kernels of SPILLS use the stack, and all kernels match csrc/cuda/resources.csv."""
    built = Path(_core.load().__file__)
    if not hasattr(_core.load(), "cuda_archs"):
        pytest.skip("the core was built without CUDA")
    if not all(map(resources.find_tool, ("cuobjdump", "nvdisasm"))) or not shutil.which("c++filt"):
        pytest.skip("needs cuobjdump and nvdisasm, from the CUDA toolkit or from Triton, and c++filt")
    usage = resources.usage(built)
    assert {row["arch"] for row in usage} == set(_core.load().cuda_archs.split())
    table = [row for row in resources.read() if row["nvcc"] == resources.nvcc_version()]
    known = {(row["arch"], row["kernel"]): {name: row[name] for name in usage[0]} for row in table}
    listed = [row for row in usage if row["arch"] in {arch for arch, _ in known}]
    if not listed:
        pytest.skip("the table has no rows for this compiler and these architectures")
    assert all(row["kernel"].startswith(SPILLS) for row in listed if row["stack"] != "0")
    assert {(row["arch"], row["kernel"]): row for row in listed} == {
        key: row for key, row in known.items() if key[0] in {row["arch"] for row in listed}
    }


# ------------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["sanitizers", "race"])
def test_kernels_pass_the_sanitizers_and_the_race_check(checks, tmp_path):
    """The kernels have no access out of bounds, no undefined behavior and no race for shared memory."""
    flags = SANITIZE if checks == "sanitizers" else ["-DSGALIGN_RACE_CHECK"]
    module = build(tmp_path / checks, "-O1", *flags)
    # libstdc++ is preloaded, too, because the sanitizer looks for C++ exceptions when it is loaded.
    find = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    preloaded = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in find)
    environment = {"SGALIGN_EMULATED_CORE": str(module), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    if checks == "sanitizers":
        environment["LD_PRELOAD"] = preloaded
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "tests/test_cuda.py"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
