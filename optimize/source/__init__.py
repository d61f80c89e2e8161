"""Source: the user's model, data and metric, where they come from and which samples do what."""
