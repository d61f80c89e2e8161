"""Graph: what is done to ONNX files by several methods."""
