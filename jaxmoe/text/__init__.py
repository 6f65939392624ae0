"""The tokenizer, and the rendering of chats and of prompts with pictures into token ids."""

from jaxmoe.text.chat import render, render_chat
from jaxmoe.text.learned import Learned, render_learned
from jaxmoe.text.pictures import Prompt, split_places, text_prompt, token_prompt
from jaxmoe.text.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Learned",
    "Prompt",
    "StreamDecoder",
    "Tokenizer",
    "render",
    "render_chat",
    "render_learned",
    "split_places",
    "text_prompt",
    "token_prompt",
]
