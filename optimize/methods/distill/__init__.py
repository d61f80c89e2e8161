"""Distill: methods in which the trained model teaches, one file each."""
