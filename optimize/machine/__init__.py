"""Machine: what this one has of what optimize works with."""
