"""Fine-tuning and evaluation of converted models."""
