"""loadtest: drive a Triton endpoint and tell honestly what it holds. Imports neither torch nor the other rooms."""
