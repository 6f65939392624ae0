"""Measures of a model: logits by any path, needles in long contexts, repetition, a self-test."""
