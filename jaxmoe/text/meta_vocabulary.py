"""Reads Meta's `tokenizer.model` for Llama 4 into a byte-level BPE of the `tokenizers` library.

The file has one line "base64 rank" per token. The ranks are the ids, and lower ranks merge first.
The split pattern and the special tokens are not in the file, so they are written down here.
"""

import base64
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from jaxmoe.errors import UserError
from jaxmoe.parsing import read_bytes

RANKS = 200_000
SPECIALS = 2_048

_LEAD = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def _byte_chars() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = count(256)
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


BYTE_CHARS = _byte_chars()


def load_meta_vocabulary(path: Path) -> tokenizers.Tokenizer:
    """Reads Meta's Llama 4 `tokenizer.model`.

    Raises:
        UserError: if the file cannot be read, a line is not "base64 rank", or the ranks are not
            Llama 4's 200,000.
    """
    return byte_pair_encoder(_read_ranks(path), special_names())


def byte_pair_encoder(ranks: dict[bytes, int], specials: list[str]) -> tokenizers.Tokenizer:
    """Builds a byte-level BPE tokenizer.

    Its post-processor puts the first special token in front of a text, as the published
    `tokenizer.json` does.

    Args:
        ranks: the id of each token, by its bytes; lower ids merge first.
        specials: the names of the special tokens, whose ids follow the last rank.
    """
    char_of_byte = dict(enumerate(BYTE_CHARS))
    vocab = {token.decode("latin-1").translate(char_of_byte): rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=list(_merges(vocab)), ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    bos = specials[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, backend.token_to_id(bos))],
    )
    return backend


def special_names() -> list[str]:
    """The names of Llama 4's 2,048 special tokens in the order of their ids, from 200000 on."""
    post_train, vision, reasoning = (
        f"{use}_reserved_special_token" for use in ("text_post_train", "vision", "reasoning")
    )
    names = [
        *("begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"),
        *("header_start", "header_end", "eom", "eot", "step"),
        *_numbered(post_train, 0, 6),
        *("python_start", "python_end", "finetune_right_pad"),
        *_numbered(post_train, 8, 69),
        *("image_start", "image_end"),
        *_numbered(vision, 0, 2),
        *("tile_x_separator", "tile_y_separator"),
        *_numbered(vision, 2, 6),
        "image",
        *_numbered(vision, 6, 7),
        "patch",
        *_numbered(vision, 7, 1048),
        *_numbered(reasoning, 0, 8),
        *("reasoning_thinking_start", "reasoning_thinking_end"),
    ]
    names += _numbered("reserved_special_token", 0, SPECIALS - len(names))
    return [f"<|{name}|>" for name in names]


def _numbered(name: str, start: int, stop: int) -> list[str]:
    return [f"{name}_{number}" for number in range(start, stop)]


def _merges(vocab: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Every pair of tokens whose concatenation is a token, in the order of that token's rank."""
    for token in sorted(vocab, key=vocab.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                yield left, right


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(
                f"{path}, line {number} is not 'base64 rank': this is no tokenizer.model of "
                "Llama 4; download it again"
            ) from None
    if sorted(ranks.values()) != list(range(RANKS)):
        raise UserError(
            f"{path} holds {len(ranks):,} tokens that are not Llama 4's ranks 0 to {RANKS - 1:,}: "
            "it is cut short or belongs to another model; download it again"
        )
    return ranks
