"""Config: what a model is served for and how, as settings, as the target, and as Triton writes it."""
