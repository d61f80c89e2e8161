"""serve.plan: how many machines hold an objective at a rate, what they cost, and what happens when some are gone."""
