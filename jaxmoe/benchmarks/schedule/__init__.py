"""Static analysis of kernels and of decoding steps, compiled for an absent GPU."""
