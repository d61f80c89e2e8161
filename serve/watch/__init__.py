"""Watch: whether models answer, what is done when one is dead, and what a server counts."""
