"""How exact a kernel must be: the rule that the tests of all operations and backends share."""

import torch


def assert_accurate(exact, plain, ours, standard=None, *, floor=0.0):
    """Assert that results are off by no more than rounding explains.

    The yardstick is the larger of two errors: that of plain PyTorch in the same dtype, which depends on the machine's
    BLAS, and the standard error expected for these inputs. The error may be at most twice as large for outputs and
    three times as large for gradients, plus a few units in the last place.

    Args:
        exact: outputs and gradients of the reference in float64, a list of each; None for what has no gradient.
        plain: those of the reference in the dtype under test.
        ours: those of the kernels in that dtype.
        standard: the standard error expected for each element of `ours`; None where a few units in the last place
            are more than that.
        floor: the least magnitude whose units in the last place are added, for results that cancel to nothing.
    """
    standard = standard or [[torch.zeros(())] * len(results) for results in exact]
    for kind, factor, *results in zip(("output", "gradient"), (2, 3), exact, plain, ours, standard, strict=True):
        for i, (expected, theirs, mine, deviation) in enumerate(zip(*results, strict=True)):
            if expected is None:
                assert mine is None
                continue
            assert mine.dtype == theirs.dtype and mine.shape == expected.shape
            if not expected.numel():
                continue
            magnitude = max(floor, expected.abs().max().item())
            if mine.dtype == torch.float64:
                allowed = 1e-12 * magnitude
            else:
                yardstick = max((theirs - expected).abs().max().item(), deviation.max().item())
                allowed = factor * yardstick + 8 * torch.finfo(mine.dtype).eps * magnitude
            error = (mine - expected).abs().max().item()
            assert error <= allowed, f"{kind} {i}: {error} > {allowed}"
