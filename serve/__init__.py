"""serve: the model repository, its configuration, and a real Triton server. Never imports torch."""
