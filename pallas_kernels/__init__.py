"""Accelerator kernels and their XLA references. Imports jax, numpy and jaxtyping only."""
