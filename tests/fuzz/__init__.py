"""Mutated files of strangers and of users: each is read right, or refused in one sentence."""
