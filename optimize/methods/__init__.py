"""Methods: what makes a model smaller or faster, one file each, and the table of all."""
