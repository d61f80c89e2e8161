"""Watch: whether models answer, what is done when one is dead, and what a server counts.

The repository says which models there are, at any moment: no list of the start is kept. Healed is what the server was
seen to have loaded once, so that nobody meddles with a model on its way in. Triton's own readiness is not believed: it
stays true when a backend process is dead, while other instances or a response cache answer in its place.
"""
