"""Server: a real Triton server on this machine, from its installation to its end."""
