"""Clients: code and commands that ask a published model."""
