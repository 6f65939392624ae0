#!/usr/bin/env python
"""Makes the demo model: `prepare` text and tokenizer, then train, then `finish` (demo/README.md)."""

import argparse
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import tokenizers
from _cli import run
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import TrainConfig, read_train_config
from jaxmoe.train.data import is_held_out

CONFIG = "configs/demo.yaml"
WHOLE_TEXT = "ge1:1-re22:21"
SPECIALS = (  # Llama 4's names, in Llama 4's place: after the ordinary tokens
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|finetune_right_pad|>",
)


def chapters() -> list[str]:
    """The text of each chapter, a verse a line, from the installed Debian package."""
    if shutil.which("bible") is None:
        raise UserError("the text is not installed; run: apt-get install bible-kjv-text")
    command = ["bible", "-f", WHOLE_TEXT]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    verses = [re.fullmatch(r"(\w+?\d+):\d+ (.*)", line) for line in printed.splitlines()]
    by_chapter = itertools.groupby(filter(None, verses), key=lambda verse: verse[1])
    return ["\n".join(verse[2] for verse in group) for _, group in by_chapter]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` entries."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return Tokenizer(backend)


def prepare(config: TrainConfig) -> None:
    """Writes the tokenizer, trained on training chapters only, and the tokens of all chapters."""
    texts = chapters()
    every = config.data.held_out_every
    seen = [text for i, text in enumerate(texts) if not is_held_out(i, every)]
    tokenizer = train_tokenizer(seen, config.model["vocab_size"])
    end = tokenizer.special("<|end_of_text|>")
    ids = [[*tokenizer.encode(text, bos=True), end] for text in texts]
    tokens = Path(config.data.tokens)
    tokens.parent.mkdir(parents=True, exist_ok=True)
    np.save(tokens, np.concatenate(ids).astype(np.uint16))
    tokenizer.save(tokens.parent)
    print(f"Wrote {sum(map(len, ids)):,} tokens of {len(texts):,} chapters to {tokens}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare", "finish"))
    args = parser.parse_args()
    config = read_train_config(CONFIG)
    prepare(config)


if __name__ == "__main__":
    run(main)
