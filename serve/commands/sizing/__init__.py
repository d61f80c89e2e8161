"""serve.commands.sizing: those that say how a model should be served, from a model of the server."""
