"""Folder: a run's own folder: what it is known by, what is taken from another's, how all are listed and removed."""
