"""Probing: the highest rate that keeps the limits, found by many runs."""
