"""Small byte-level tokenizers, made on the spot."""

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jaxmoe.text import Tokenizer
from jaxmoe.text.meta_vocabulary import byte_pair_encoder

CHAT = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"]


def byte_tokenizer(specials: list[str] = CHAT) -> Tokenizer:
    """One token a byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return Tokenizer(backend)


def trained_backend(corpus: list[str], size: int, specials: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `size` tokens, trained on a corpus."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def ranked_tokenizer(*merged: bytes) -> Tokenizer:
    """A tokenizer of all single bytes, and `merged` in the order of their ranks."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + rank for rank, token in enumerate(merged)}
    return Tokenizer(byte_pair_encoder(ranks, ["<|begin_of_text|>", "<|eot|>"]))
