"""What is kept on disk: compressed checkpoints."""
