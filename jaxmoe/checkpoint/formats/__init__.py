"""Readers and writers of the files that others define; they know no parameter names."""
