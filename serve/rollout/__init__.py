"""Rollout: a version becomes the one that answers, or goes back; two versions side by side."""
