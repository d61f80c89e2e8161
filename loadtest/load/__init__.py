"""Load: one load from its first request to its last, in this process or several, here or on other machines."""
