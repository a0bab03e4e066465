"""Cache-DiT for inferred plans: forward patterns of lists of blocks, their application, and their proof."""
