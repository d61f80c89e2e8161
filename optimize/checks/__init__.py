"""Checks: what would fail later, found in the first seconds."""
