"""Benchmarks: ours beside what one would use instead. `python -m benchmarks.gpu_report` runs them on a GPU."""
