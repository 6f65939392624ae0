"""Compiles kernels for accelerators that are absent, and analyzes the machine code."""
