"""Model: what a torch module is made of, how it is copied, and what is wrong with it; the errors of this room."""
