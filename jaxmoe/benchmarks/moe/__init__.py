"""The mixture of experts, checked and timed on a GPU."""
