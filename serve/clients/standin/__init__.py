"""Stand-in: a server that answers from a repository's configurations, without a model."""
