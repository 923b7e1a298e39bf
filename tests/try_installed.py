"""Try the installed package: its command, and attention of both branches on the CPU. Run it with `python -I`.

`make wheel` and cibuildwheel run this script in an environment that has only the built package and what it needs.
"""

import subprocess
import sys
from pathlib import Path

import torch

import sgalign
from sgalign.commands.doctor import openmp_runtimes


def main() -> None:
    """Print what was tried. End with an error if anything does not work."""
    place = Path(sgalign.__file__).resolve()
    if Path(__file__).resolve().parents[1] in place.parents and "site-packages" not in place.parts:
        sys.exit(f"must run with an installed package, got the source folder: {place}")
    command = Path(sys.executable).with_name("sgalign")
    version = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    if version != sgalign.__version__:
        sys.exit(f"`sgalign --version` must print {sgalign.__version__}, got {version}")
    print(subprocess.run([command, "doctor"], check=True, capture_output=True, text=True).stdout, end="")
    runtimes = openmp_runtimes()
    if runtimes is not None and len(runtimes) != 1:
        sys.exit(f"the core and torch must share one OpenMP runtime, got {runtimes}")
    tensors = [torch.randn(2, 4, 100, 32, requires_grad=True) for _ in range(4)]
    gradients = {}
    for backend in ("cpu", "reference"):
        outs = sgalign.dual_branch_attention(*tensors, mask_ratio=0.1, mask_seed=1, backend=backend)
        gradients[backend] = torch.autograd.grad(sum((out**2).sum() for out in outs), tensors)
    torch.testing.assert_close(gradients["cpu"], gradients["reference"], atol=1e-4, rtol=1e-4)
    print(f"sgalign {version} works: gradients of the cpu backend agree with the reference")


if __name__ == "__main__":
    main()
