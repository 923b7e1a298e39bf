"""Triton kernels. They live in `kernels/` of the source tree and are installed as `sgalign.kernels`."""

if __name__ != "sgalign.kernels":
    raise ImportError("this folder is the package sgalign.kernels: `import sgalign.kernels`")
