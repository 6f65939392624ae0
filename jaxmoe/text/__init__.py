"""Text in and out: the tokenizer and the chat format."""

from jaxmoe.text.chat import render
from jaxmoe.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "render"]
