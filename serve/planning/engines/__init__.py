"""Engines: many replicas simulated at once, or one after the other where more than batches happens."""
