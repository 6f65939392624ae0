"""Compiles kernels for accelerators that are not there, and reads the machine code."""
