"""The fused operations, one per module, with their reference definitions, backends and compiled core."""
