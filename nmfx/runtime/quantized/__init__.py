"""Networks in int8: ranges of activations, quantised weights, and which nodes of a lowered graph compute in bytes."""
