"""Attacks on a model that has forgotten, one a file; what comes out is judged like any model."""
