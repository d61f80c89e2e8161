"""TensorRT: NVIDIA's compiler for RTX GPUs, which needs none to say whether it takes a graph."""
