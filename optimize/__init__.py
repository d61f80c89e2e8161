"""optimize: take a trained PyTorch model, prune, distill, quantize and export it, and prove what came out."""
