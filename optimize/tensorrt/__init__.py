"""TensorRT: its rules, its compiler where that is installed, and what builds and serves a bundle with it."""
