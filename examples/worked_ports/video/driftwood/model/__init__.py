"""Model library of driftwood: the network, and its comparison with the original code."""
