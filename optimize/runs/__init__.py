"""Runs: a recipe from its first step to the endpoint."""
