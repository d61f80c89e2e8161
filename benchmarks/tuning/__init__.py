"""The parts of `make bench-tune`, one module each, and what they share."""
