"""loadtest.calls: what commands and Python programs do alike, and the results that Python gets."""
