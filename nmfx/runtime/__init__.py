"""A CPU runtime for networks with N:M weights: compile a converted model, run it faster than its dense original."""
