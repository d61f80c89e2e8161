"""Selftest: what the load generator itself can do here, against a server that computes nothing."""
