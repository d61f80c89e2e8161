"""Commands: those of optimize, one module each; heavy imports stay inside the functions."""
