"""Conversion of Hugging Face and Meta checkpoints to the project's own."""

from jaxmoe.checkpoint.convert.conversion import Report, convert
from jaxmoe.checkpoint.convert.verification import verify

__all__ = ["Report", "convert", "verify"]
