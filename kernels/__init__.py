"""The Triton kernels. They are in `kernels/` of the source tree and are installed as `sgalign.kernels`."""
