"""Tune: a model's configuration, looked for in a simulation of measured times and confirmed live."""
