"""Export: the way from a torch module to an ONNX file."""
