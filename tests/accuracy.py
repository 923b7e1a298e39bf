"""The accuracy that a kernel must reach, a rule that the tests of all operations and backends share."""

import torch


def assert_accurate(exact, plain, ours, standard=None, *, floor=0.0):
    """Assert that rounding explains the errors of the results.

    The yardstick is the larger of two errors: the error of plain PyTorch in the same dtype, which depends on the
    machine's BLAS, and the standard error expected for these inputs. An output's error may be at most twice the
    yardstick, and a gradient's error at most three times, plus a few units in the last place.

    Args:
        exact: list of outputs and list of gradients of the reference in float64. A gradient that does not exist is
            None.
        plain: the same lists of the reference in the dtype under test.
        ours: the same lists of the kernels in this dtype.
        standard: the standard error expected for each element of `ours`, in the same lists. If None, a few units in
            the last place are more than the standard error.
        floor: the smallest magnitude from which the units in the last place are computed. It allows for results that
            cancel to nearly 0.
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
