"""Judge: how good, how large and how fast a model is, and whether that is enough."""
