"""Commands of serve, one module each: parse, call, print."""
