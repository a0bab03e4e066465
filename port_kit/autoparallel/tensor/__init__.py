"""Tensor parallelism of unmodified modules: inferred from the sparsity of Jacobians, applied with vLLM's linears."""
