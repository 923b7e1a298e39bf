"""The Triton kernels, in `kernels/` of the source tree and in `sgalign.kernels` of an installation."""
