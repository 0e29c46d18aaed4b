"""Benchmarks: one file each, with its splits, its metrics, how they add up, and its citation."""
