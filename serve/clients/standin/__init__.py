"""A stand-in for a Triton server: it answers from a repository's configurations, without a model."""
