"""TensorRT: the rules of its parser, its compiler where it is installed, and what builds and serves a bundle with it."""
