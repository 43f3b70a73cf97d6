"""A model as a graph of PyTorch's operators, its sites fused."""
