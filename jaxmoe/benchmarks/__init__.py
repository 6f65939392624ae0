"""Benchmarks: speed against other libraries, and static figures from the compilers' output."""
