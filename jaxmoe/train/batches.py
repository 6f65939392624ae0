"""The batches of a run as its config says: from a file of tokens, or from rows of texts and chats.

A batch is a function of the step's number, and the same on every process.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.images import read_image_settings
from jaxmoe.processes import on_first
from jaxmoe.text import Tokenizer
from jaxmoe.train import data
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.documents import Documents, Reading, documents_in
from jaxmoe.train.packed import AnyBatch, PackedData
from jaxmoe.train.run_folder import DATA
from jaxmoe.train.sources import files_of


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        batches: the batch of each step, counted from 0.
        held_out: the batches that are never trained on, each row once.
        has_pictures: whether batches are `PictureBatch`.
        summary: what there is, in one line; empty for a file of tokens.
        skipped: rows that could not be used.
        everything: the batches of all rows once, where rows are pairs of answers; else None.
        pairs: how many pairs there are, held-out ones too.
        made_of: a digest of the files that the pairs were read from.
    """

    batches: Callable[[int], AnyBatch]
    held_out: Callable[[], Iterator[AnyBatch]]
    has_pictures: bool = False
    summary: str = ""
    skipped: int = 0
    everything: Callable[[], Iterator[AnyBatch]] | None = None
    pairs: int = 0
    made_of: str = ""


def training_data(config: TrainConfig, model: Llama4Config) -> TrainingData:
    """The data of a config; documents are tokenized into a folder within its output.

    Raises:
        UserError: for data that cannot be trained on; if a row cannot be used, nothing is written.
    """
    wanted = config.rows
    if wanted.tokens is not None:
        if config.preference is not None:
            raise UserError("pairs of answers are read from data.files; data.tokens has none.")
        return _of_tokens(config, model, wanted.tokens)
    reading = _reading(config, model)
    documents = _documents(config, reading)
    packed = PackedData(documents, wanted, model, reading, config.seed)
    what = packed.has_pictures, packed.summary, documents.skipped
    found = TrainingData(packed.batch, packed.held_out, *what)
    if not reading.pairs:
        return found
    return dataclasses.replace(
        found, everything=packed.everything, pairs=len(documents), made_of=documents.made_of
    )


def _of_tokens(config: TrainConfig, model: Llama4Config, path: str) -> TrainingData:
    """Rows that are cut from a file of tokens, checked to be in the vocabulary and enough."""
    wanted, begin_id = config.rows, model.bos_token_id
    tokens = data.read_tokens(path, wanted.dtype)
    data.check_tokens(tokens, model.vocab_size, path)
    data.check_documents(tokens, begin_id, wanted.held_out_every, path)
    training, held_out = data.split(tokens, begin_id, wanted.held_out_every)
    sizes = {"length": wanted.length, "rows": wanted.batch_size}

    def batch(step: int) -> data.Batch:
        return data.training_batch(training, begin_id, **sizes, seed=config.seed, step=step)

    batch(0)  # there are enough of them
    return TrainingData(
        batch, functools.partial(data.held_out_batches, held_out, begin_id, **sizes)
    )


def _documents(config: TrainConfig, reading: Reading) -> Documents:
    """The documents of the config's files, which process 0 tokenizes while the others wait."""
    wanted = config.rows
    patterns = [*(source for source, _ in wanted.mixture), wanted.held_out]
    sources = [[file for name in names for file in files_of(name)] for names in patterns]
    place = Path(config.output) / DATA
    build = functools.partial(documents_in, place, sources, reading)
    if jax.process_count() > 1:
        on_first(lambda: len(build()))  # the others find it done
        if not place.exists():
            raise UserError(
                f"{place} is not seen by process {jax.process_index()}; share the output."
            )
    return build()


def _reading(config: TrainConfig, model: Llama4Config) -> Reading:
    folder = config.tokenizer_folder
    tokenizer = Tokenizer.load_if_any(folder) if folder is not None else None
    if folder is None or tokenizer is None:
        raise UserError("data of texts needs a tokenizer; give 'tokenizer', a folder that has one.")
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{folder} has a tokenizer of {tokenizer.vocab_size} tokens, but the model has "
            f"{model.vocab_size}; use the model's own."
        )
    images = read_image_settings(folder, model.vision) if model.vision is not None else None
    return Reading(tokenizer, images, config.rows.on_bad == "skip", config.preference is not None)
