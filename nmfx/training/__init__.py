"""Statistics, evaluation and (to come) fine-tuning of converted models."""
