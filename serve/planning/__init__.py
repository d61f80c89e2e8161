"""Planning: how many machines hold an objective at a rate, what they cost, and what happens when some are gone."""

BALANCERS = ("random", "round-robin", "least-loaded", "pinned")
"""What may stand before the replicas."""
