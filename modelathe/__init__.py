"""modelathe: what the three rooms stand on: errors, command line, tensors, files, and a client for any V2 server."""
