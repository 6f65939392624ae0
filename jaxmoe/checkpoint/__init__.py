"""Checkpoint files <-> parameters: Hugging Face safetensors in and out, Orbax in between."""
