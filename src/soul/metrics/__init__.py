"""Metrics: numbers and strings in, Score out; no model."""
