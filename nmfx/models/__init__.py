"""What a model is, and what of it can be masked."""
