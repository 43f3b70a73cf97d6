"""The model as a graph of sites: what can be masked, what it costs, and the swap of a weight's owner."""
