"""Makes the demo model: `prepare` its text, then train, then `finish` (see demo/README.md)."""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from demo import demo_report
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.errors import UserError
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import TrainConfig, read_train_config
from jaxmoe.train.data import is_held_out
from jaxmoe.train.make_tokens import tokens_of

CONFIG = "configs/demo.yaml"
DEMO = Path("demo")
WHOLE_TEXT = "ge1:1-re22:21"
VERSE = r"(\w+?)(\d+):(\d+) (.*)"  # such as: 1Sm3:4 That the LORD called Samuel
SPECIALS = (  # Llama 4's names, in Llama 4's place: after the ordinary tokens
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|finetune_right_pad|>",
)


def verses_by_chapter() -> list[list[re.Match]]:
    """The verses of each chapter, from the installed Debian package.

    Returns:
        matches whose groups are the book, the numbers of chapter and verse, and the text.
    """
    if shutil.which("bible") is None:
        raise UserError("the text is not installed; run: apt-get install bible-kjv-text")
    command = ["bible", "-f", WHOLE_TEXT]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    verses = [re.fullmatch(VERSE, line) for line in printed.splitlines()]
    by_chapter = itertools.groupby(filter(None, verses), key=lambda verse: verse.group(1, 2))
    return [list(group) for _, group in by_chapter]


def chapters() -> list[str]:
    """The text of each chapter, a verse a line."""
    return ["\n".join(verse[4] for verse in chapter) for chapter in verses_by_chapter()]


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
    every = config.rows.held_out_every
    seen = [text for i, text in enumerate(texts) if not is_held_out(i, every)]
    tokenizer = train_tokenizer(seen, config.model["vocab_size"])
    ids = tokens_of(texts, tokenizer)
    tokens = Path(str(config.rows.tokens))
    tokens.parent.mkdir(parents=True, exist_ok=True)
    np.save(tokens, ids)
    tokenizer.save(tokens.parent)
    write_json(tokens.parent / "generation_config.json", generation_config(config.model))
    write_json(tokens.parent / "tokenizer_config.json", tokenizer_config())
    print(f"Wrote {len(ids):,} tokens of {len(texts):,} chapters to {tokens}.")


def generation_config(model: dict) -> dict:
    ids = {key: model[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


def tokenizer_config() -> dict:
    begin, end, *_, pad = SPECIALS
    names = {"bos_token": begin, "eos_token": end, "pad_token": pad}
    return names | {"tokenizer_class": "PreTrainedTokenizerFast"}


def finish(config: TrainConfig) -> None:
    """Exports the trained model to demo/model, measures that, and writes its numbers down."""
    shutil.rmtree(DEMO / "model", ignore_errors=True)
    export(Path(config.output) / "checkpoint", DEMO / "model")
    with tempfile.TemporaryDirectory() as folder:
        convert(DEMO / "model", Path(folder) / "checkpoint")
        metrics = demo_report.measure(config, Path(folder) / "checkpoint")
    write_json(DEMO / "metrics.json", metrics)
    readme = DEMO / "README.md"
    readme.write_text(demo_report.with_numbers(readme.read_text(), metrics))
    print(f"Wrote {DEMO}/model, metrics.json and the numbers in README.md.")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare", "finish"))
    command = {"prepare": prepare, "finish": finish}[parser.parse_args().command]
    command(read_train_config(CONFIG))
