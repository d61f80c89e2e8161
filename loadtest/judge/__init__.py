"""Judge: what a run is worth, what it says, and how it differs from another.

A run that fails is invalid, not only slow, and whatever reads its document inherits that: gates, baselines, exports.
Who expects failures says so with a threshold on `errors`, which stands in the plan, so that every later
reader knows it.

Of two equal runs about one figure in twenty is called different, of queues near their limit too. The price is that such
queues need longer runs. `pytest -s tests/loadtest/judge/test_dependence.py -k equal` counts.
"""
