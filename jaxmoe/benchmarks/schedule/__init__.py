"""What the compiler for an absent GPU makes of kernels and of decoding steps."""
