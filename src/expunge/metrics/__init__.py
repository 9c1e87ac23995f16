"""Metrics: outcomes and features of picture pairs (before, after) to numbers with intervals."""
