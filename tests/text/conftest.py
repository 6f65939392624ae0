"""Fixtures: a small tokenizer that is trained here, and Meta's from the package llama-models."""

import base64
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from jaxmoe.text import Tokenizer
from tests.small_tokenizers import trained_backend

CORPUS = [
    "the user asks the assistant, and the assistant answers\n\n",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f680",
]
CHAT_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
]


def _train(specials: list[str]) -> tokenizers.Tokenizer:
    return trained_backend(CORPUS, 330, specials)


@pytest.fixture
def train_small() -> Callable[[list[str]], tokenizers.Tokenizer]:
    """Trains a byte-level BPE with the given special tokens."""
    return _train


@pytest.fixture
def small() -> Tokenizer:
    return Tokenizer(_train(CHAT_SPECIALS))


@pytest.fixture(scope="session")
def meta_folder() -> Path:
    """The folder of Meta's tokenizers in the installed package, which is not imported."""
    spec = find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("Meta's tokenizer.model is missing: pip install llama-models")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def meta(meta_folder) -> Tokenizer:
    return Tokenizer.load(meta_folder / "llama4")


@pytest.fixture(scope="session")
def tiktoken_oracle(meta_folder):
    """The tiktoken library, whose file format this is, with the same ranks."""
    lines = (meta_folder / "llama4/tokenizer.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    letters = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    capitals = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    words = rf"[^\r\n\p{{L}}\p{{N}}]?(?:{letters}|{capitals})(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rest = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding(
        "llama4", pat_str=f"{words}|{rest}", mergeable_ranks=ranks, special_tokens={}
    )
