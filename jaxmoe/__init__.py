"""Llama 4 (Scout, Maverick) in JAX and Flax: exact, long, and on your own mesh.

import jaxmoe

llm = jaxmoe.LLM("checkpoint")  # a folder that `jaxmoe convert` wrote, on all devices
for result in llm.generate(["In the beginning", "And God said"], max_new_tokens=32):
    print(result.text)
"""

from importlib import metadata

from jaxmoe.checkpoint.store import load, save
from jaxmoe.config import (
    MAVERICK,
    SCOUT,
    AttentionSpec,
    LayerKind,
    Llama4Config,
    RopeScaling,
)
from jaxmoe.errors import UserError
from jaxmoe.generation.document import Document
from jaxmoe.generation.engine import Request, Token, generate
from jaxmoe.generation.grammar import Grammar
from jaxmoe.generation.llm import LLM
from jaxmoe.generation.results import Piece, Result, Score
from jaxmoe.generation.sampling import RepetitionDetection, Sampling
from jaxmoe.generation.saved_document import load_document, read_document
from jaxmoe.generation.text import generate_text
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.adapters import merge_adapters, one_adapter
from jaxmoe.model.params import quantize_params
from jaxmoe.model.transformer import Llama4, forward, unembed
from jaxmoe.text import Tokenizer, render

__version__ = metadata.version("jaxmoe")

__all__ = [
    "LLM",
    "MAVERICK",
    "SCOUT",
    "AttentionSpec",
    "Document",
    "Grammar",
    "LayerKind",
    "Llama4",
    "Llama4Config",
    "MeshConfig",
    "Piece",
    "RepetitionDetection",
    "Request",
    "Result",
    "RopeScaling",
    "Sampling",
    "Score",
    "Token",
    "Tokenizer",
    "UserError",
    "forward",
    "generate",
    "generate_text",
    "load",
    "load_document",
    "merge_adapters",
    "one_adapter",
    "quantize_params",
    "read_document",
    "render",
    "save",
    "unembed",
]
