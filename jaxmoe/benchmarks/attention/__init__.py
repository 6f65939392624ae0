"""Llama 4's attention, checked and timed on a GPU."""
