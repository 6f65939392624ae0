"""Benchmarks: speed beside other libraries, and static figures from the compilers' output."""
