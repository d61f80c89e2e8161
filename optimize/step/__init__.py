"""Step: what every method gets and gives, and the bundle that it leaves on disk."""
