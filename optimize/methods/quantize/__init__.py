"""Quantize: methods that store and compute in fewer bits, one file each, and what they share."""
