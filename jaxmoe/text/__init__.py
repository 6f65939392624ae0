"""The tokenizer, and the rendering of chats into token ids."""

from jaxmoe.text.chat import render
from jaxmoe.text.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "render"]
