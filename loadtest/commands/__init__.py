"""Commands of loadtest, one module each."""
