"""How requests reach the server, one module for each way."""
