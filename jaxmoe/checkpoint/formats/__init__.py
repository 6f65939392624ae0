"""Readers and writers of the files that other projects define; they know no parameter names."""
