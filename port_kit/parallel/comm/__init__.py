"""Communication between ranks: symmetric-memory buffers, fused Ulysses and Ring, stream interleaving."""
