"""Predict: named arrays in, named arrays out, from a module, a file or an endpoint."""
