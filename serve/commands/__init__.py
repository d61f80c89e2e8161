"""Commands: those of serve, one module each: parse, call, print."""
