"""Exact metrics, post-processing, statistics and baselines (floor 2)."""
