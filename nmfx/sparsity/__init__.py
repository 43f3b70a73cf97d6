"""N:M sparsity on one tensor: no graph, no model."""
