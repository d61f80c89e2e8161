"""Judge: how good, how large and how fast a model is, and whether that is enough.

Quality is judged on the recipe's result and again at the endpoint, not after each step: a pruned model is meant to be
bad until it was healed. Speed is measured once, at the end, all steps in the same rounds, so that the rows of the table
can be compared; `make bench-ruler` measures files against themselves. No direction is guessed: a score that is neither
bounded nor named in `higher_is_better` is refused, or a perplexity that rises from 12 to 900 would look like a gain.
"""
