"""Pipelines: models of Triton's own making before and behind a model, so that an application sends what it has."""
