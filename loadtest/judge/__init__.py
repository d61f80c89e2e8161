"""Judge: what a run is worth, what it says, and how it differs from another."""
