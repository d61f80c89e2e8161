"""Pipelines: models of Triton's own making before and behind a model, so that an application sends what it has.

A pipeline names the model that it calls, not a version: promoting the model changes what the pipeline answers with. Its
own parts are versions like any other. Its lineage holds example inputs, so that probes and load tests send real images.
"""
