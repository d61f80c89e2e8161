"""Send: requests as bytes, over HTTP, gRPC, streams and shared memory, and their answers back.

HTTP/1.1 requests, and HTTP/2 for gRPC calls, are written here: they send messages that were built before the run, and a
general client costs more CPU than many models do. Both are tested against another implementation, at every split of the
bytes. Streams go through grpcio, everything else through tritonclient.
"""
