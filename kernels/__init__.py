"""Triton kernels. They live in `kernels/` of the source tree and are installed as `sgalign.kernels`."""
