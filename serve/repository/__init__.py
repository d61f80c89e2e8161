"""Repository: models and their versions on disk, read, checked and written."""
