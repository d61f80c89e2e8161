"""serve.simulate: Triton's scheduler as its source code does it, run on measured times of a call."""
