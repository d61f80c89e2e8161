"""Prune: methods that take weights, channels, heads and layers away, one file each, and what they share."""
