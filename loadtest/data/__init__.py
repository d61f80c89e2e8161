"""Data that a user gives to send, one module for each kind of file; `read.read` decides which one it is."""
