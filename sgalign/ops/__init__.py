"""The fused operations, one a module, and what serves them: reference definitions, backends, the compiled core."""
