"""Model library of retouch: the network, and its comparison with the original code."""
