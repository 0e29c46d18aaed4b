"""Objectives: one file a method, each (model, batch, reference) -> LossOut."""
