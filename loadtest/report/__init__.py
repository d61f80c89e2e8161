"""Report: a run for the terminal, as a page, and in the forms that other tools read."""
