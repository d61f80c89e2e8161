"""The commands of `loadtest`, one module each."""
