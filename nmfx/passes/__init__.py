"""What is done to a model, one pass a file: each is a function that returns what it made."""
