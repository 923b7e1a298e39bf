"""Run attention for a profiler: `python -m benchmarks.profile`, alone or under Nsight Compute.

To profile with Nsight Compute, run

    ncu --profile-from-start off --clock-control none --set full -k 'regex:forward_kernel|gradient_kernel' \
        python -m benchmarks.profile

It sees six launches: for each shape, the forward kernel, the kernel of the query gradients, and the kernel of the key
and value gradients.

The program runs both branches, forward and backward, in bfloat16, at one shape of SGTR and at a long one. Compilation
and warm-up come first. Only the profiled calls lie between `cudaProfilerStart` and `cudaProfilerStop`.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks import measuring
from benchmarks.measuring import differentiated

SHAPES = [(8, 8, 180, 1024, 32), (1, 8, 16384, 16384, 64)]  # B, H, Lq, Lk, D
WARM_UPS = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="run everything on tiny inputs without a GPU")
    options = parser.parse_args(arguments)
    if options.rehearse:
        from benchmarks import rehearsal

        rehearsal.install_for_profile()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.profile: torch finds no GPU here, so there is nothing to profile; --rehearse runs without one"
        )
    from benchmarks import test_attention as bench

    contender = bench.ours(measuring.available()[0])["dual"]
    for shape in SHAPES:
        torch.manual_seed(0)
        run = differentiated(contender, bench.inputs(shape, True, torch.bfloat16, measuring.DEVICE))
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        sizes = ", ".join(map(str, shape))
        print(f"B, H, Lq, Lk, D {sizes}: ran both passes {WARM_UPS} times to warm up, then once profiled", flush=True)
    return 0


if __name__ == "__main__":
    from benchmarks import profile as module  # the module whose shapes a rehearsal changes

    sys.exit(module.main())
