"""Benchmarks of sgalign beside its alternatives. `python -m benchmarks.gpu_report` runs them on a GPU."""
