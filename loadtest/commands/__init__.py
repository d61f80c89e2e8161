"""Commands: those of loadtest, one module each."""
