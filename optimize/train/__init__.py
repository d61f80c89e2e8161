"""Train: one loop for all methods that learn, in one process or several."""
