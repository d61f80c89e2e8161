"""Send: requests as bytes, over HTTP, gRPC, streams and shared memory, and their answers back."""
