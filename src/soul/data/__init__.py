"""Data: the only place that tokenises."""
