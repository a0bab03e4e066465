"""Model library of murmur: the network, and its comparison with the original code."""
