"""Which parameter lies in which stored tensor, and how: one table, read in both directions."""
