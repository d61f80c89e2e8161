"""Data: what requests carry, read from files or drawn at random, and the answers that are right."""
