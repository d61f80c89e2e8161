"""modelathe: what the three rooms stand on. It imports none of them."""
