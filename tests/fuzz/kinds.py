"""The kinds of input that are damaged: what a right one is, and what users make of it."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from PIL import Image

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.convert.source import open_source
from jaxmoe.generation.answers import Answers, job_digest
from jaxmoe.generation.engine import Request
from jaxmoe.generation.jobs import read_requests
from jaxmoe.generation.saved_document import document_length, load_document, read_document
from jaxmoe.hf_config import from_hf
from jaxmoe.images import ImageSettings, open_picture
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import init_params
from jaxmoe.plan.targets import parse_target
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import read_train_config
from jaxmoe.train.data import read_tokens
from jaxmoe.train.documents import Reading, documents_in
from jaxmoe.train.sources import read_rows
from tests import formats, tiny
from tests.fuzz.batch_kinds import BATCH_KINDS
from tests.fuzz.head_kinds import HEAD_KINDS
from tests.fuzz.runner import Kind
from tests.images.cases import TOKENS
from tests.small_tokenizers import CHAT, byte_tokenizer

CONFIG = tiny.scout_like(
    hidden_size=16,
    num_hidden_layers=2,
    no_rope_layer_interval=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=16,
    intermediate_size_mlp=32,
    num_local_experts=2,
    vocab_size=320,
)


def _all_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _named(*names: str) -> Callable[[Path], Iterable[Path]]:
    return lambda folder: [folder / name for name in names]


def _same_arrays(a: dict, b: dict) -> bool:
    """Whether names, dtypes and bytes agree."""
    return a.keys() == b.keys() and all(
        np.asarray(a[name]).dtype == np.asarray(b[name]).dtype
        and np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes()
        for name in a
    )


def _equal(a: Any, b: Any) -> bool:
    return a == b


# Checkpoints of others


def _write_safetensors(folder: Path, shards: int = 1) -> None:
    tiny.write_checkpoint(folder, CONFIG, tiny.random_tensors(CONFIG, 0), shards=shards)


def _write_meta(folder: Path) -> None:
    config = CONFIG | {"num_key_value_heads": 2}
    found = formats.in_meta(config, tiny.random_tensors(config, 0, jnp.bfloat16), 2)
    folder.rmdir()
    formats.write_meta(folder, formats.meta_params(config) | {"nope_layer_interval": 2}, found, 2)


def _read_source(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor that is converted, as converting reads it."""
    source = open_source(folder)
    read = {
        piece.tensor: source.read(piece.tensor, 0, _size(source, piece.tensor))
        for group in source.groups
        for piece in group.pieces
    }
    confirm = getattr(source.files, "confirm", lambda: None)  # checksums of what was read
    confirm()
    return read


def _size(source, tensor: str) -> int:
    return int(np.prod(source.files.tensors[source.stored_names[tensor]].shape))


# What this project wrote


def _write_checkpoint(folder: Path) -> None:
    _write_safetensors(folder.parent / "source")
    folder.rmdir()
    convert(folder.parent / "source", folder)


def _read_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    config, params = store.load(folder, MeshConfig().make(jax.devices()[:1]))
    return {"config": np.frombuffer(repr(config).encode(), np.uint8)} | _flat(params)


def _flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@functools.cache
def _model():
    config = dataclasses.replace(from_hf(CONFIG, "tiny"), max_position_embeddings=256)
    return config, init_params(config, jax.random.key(0))


def _write_document(folder: Path) -> None:
    config, params = _model()
    folder.rmdir()
    tokens = np.arange(150, dtype=np.int32) % 100
    for _ in read_document(config, params, tokens, folder, kv="int8", interval=64):
        pass


def _read_document(folder: Path) -> dict[str, np.ndarray]:
    config, params = _model()
    length = document_length(folder)
    return {"length": np.array(length)} | _flat(load_document(folder, config, params, 16))


# Text


_tokenizer = functools.cache(byte_tokenizer)


def _write_tokenizer(folder: Path) -> None:
    _tokenizer().save(folder)


def _read_tokenizer(folder: Path) -> list:
    tokenizer = Tokenizer.load(folder)
    tokens = tokenizer.encode("naïve 日本 text", bos=True)
    return [tokens, tokenizer.decode(tokens), tokenizer.vocab_size, tokenizer.stop_ids]


# Rows to train on


def _write_rows(folder: Path) -> None:
    says = {"role": "user", "content": "in?"}, {"role": "assistant", "content": "ha", "weight": 1}
    rows = [
        {"text": "the rain"},
        {"messages": says, "tools": [{"name": "f"}]},
        {"prompt": "a", "completion": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_rows(folder: Path) -> list:
    rows = [Reading(_tokenizer()).render(row) for row in read_rows(folder / "rows.jsonl")]
    return [(row.prompt.tokens, row.learned.tolist()) for row in rows]


def _write_documents(folder: Path) -> None:
    _write_rows(folder)
    documents_in(folder / "data", [[folder / "rows.jsonl"]], Reading(_tokenizer()))


def _read_documents(folder: Path) -> list:
    found = documents_in(folder / "data", [[folder / "rows.jsonl"]], Reading(_tokenizer()))
    return [found.records.tolist(), found.tokens.tolist(), found.learned.tolist(), found.files]


# Jobs and settings


def _write_jobs(folder: Path) -> None:
    lines = [
        {"id": "a", "prompt": "the rain"},
        {"id": 2, "messages": [{"role": "user", "content": "in the plain?"}]},
        {"id": "c", "tokens": [5, 6, 7]},
        {"id": 4, "prompt": "a", "max_tokens": 3, "n": 2, "stop": ["in"], "logit_bias": {"5": 1.5}},
        {"id": 5, "prompt": "a", "logprobs": True, "structured_outputs": {"regex": "(a|b)+"}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "jobs.jsonl").write_text(text)


def _read_jobs(folder: Path) -> list:
    return read_requests(folder / "jobs.jsonl", _tokenizer(), 9)


REQUESTS = [Request(name, (1, 2), 4) for name in "abc"]
JOB = job_digest([], REQUESTS)


def _write_answers(folder: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), Answers(folder / "out", JOB, REQUESTS) as answers:
        answers.write({"id": "b", "text": "x", "tokens": [1], "finish_reason": "stop"})
        raise KeyboardInterrupt


def _read_answers(folder: Path) -> list:
    with contextlib.suppress(KeyboardInterrupt), Answers(folder / "out", JOB, REQUESTS) as answers:
        found = sorted(answers.done)
        raise KeyboardInterrupt
    return found


def _write_yaml(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(yaml.safe_dump(content)) and None


TRAINING = {
    "output": "run",
    "tokenizer": "tokenizer",
    "model": CONFIG,
    "data": {"tokens": "tokens.npy", "length": 32, "batch_size": 2, "held_out_every": 20},
    "optimizer": {"peak_lr": 0.003, "warmup_steps": 10, "final_lr": 0.05, "weight_decay": 0.1},
    "steps": 100,
    "seed": 0,
    "mesh": "data=2",
    "checkpoint_dtype": "bfloat16",
}
MESH = {"mesh": {"expert": 4, "sequence": 2}}
TARGET = {
    "name": "mine",
    "devices": 8,
    "memory": 80 * 10**9,
    "flops": 9e14,
    "bandwidth": 3.3e12,
    "interconnect": 4.5e11,
}


def _write_tokens(folder: Path) -> None:
    np.save(folder / "tokens.npy", np.arange(1000, dtype=np.uint16) % 320)


def _read_tokens(folder: Path) -> bytes:
    tokens = read_tokens(folder / "tokens.npy")
    return bytes(str(tokens.shape), "ascii") + np.asarray(tokens).tobytes()


# Pictures

SETTINGS = ImageSettings(tile_size=28, tokens_per_tile=1)
_y, _x = np.mgrid[0:40, 0:70]
COLOUR = Image.fromarray(np.stack([_x * 3, _y * 6, (_x * _y) % 256], -1).astype(np.uint8))
ALPHA = Image.merge("RGBA", [*COLOUR.split(), COLOUR.getchannel("R")])
GREY_16 = Image.fromarray((_x * 900).astype(np.uint16))


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return exif.tobytes()


PICTURES: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
    "jpg": [
        (COLOUR, {"exif": _exif()}),
        (COLOUR, {"progressive": True, "restart_marker_blocks": 2}),
        (COLOUR.convert("CMYK"), {}),
    ],
    "png": [
        (ALPHA, {"exif": _exif()}),
        (COLOUR.quantize(16), {"transparency": bytes(range(0, 256, 16))}),
        (GREY_16, {"transparency": 900}),
        (COLOUR, {"save_all": True, "append_images": [COLOUR.transpose(5)]}),
    ],
    "webp": [
        (COLOUR, {"exif": _exif()}),
        (ALPHA, {"lossless": True}),
        (COLOUR, {"save_all": True, "append_images": [COLOUR.transpose(1)]}),
    ],
    "gif": [
        (COLOUR.quantize(16), {"transparency": 3}),
        (COLOUR, {"save_all": True, "append_images": [COLOUR.transpose(1)]}),
    ],
}


def _write_pictures(extension: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for i, (image, options) in enumerate(PICTURES[extension]):
            image.save(folder / f"{i}.{extension}", **options)

    return write


def _read_pictures(folder: Path) -> list:
    pictures = [open_picture(file, SETTINGS, "x") for file in sorted(folder.iterdir())]
    return [(picture, len(picture.tiles())) for picture in pictures]


IMAGE = 262  # of _picture_tokenizer


def _write_picture_jobs(folder: Path) -> None:
    file = io.BytesIO()
    COLOUR.save(file, "PNG")
    COLOUR.save(folder / "a.jpg")
    text = base64.b64encode(file.getvalue()).decode()
    url = {"url": f"data:image/png;base64,{text}", "detail": "auto"}
    items = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": url}]
    lines = [
        {"id": 1, "messages": [{"role": "user", "content": items}]},
        {
            "id": 2,
            "prompt": "<image> and <|image|>",
            "images": ["a.jpg", {"bytes": None, "path": "a.jpg"}],
        },
        {"id": 3, "messages": [{"role": "user", "content": "a <image>", "images": ["a.jpg"]}]},
        {"id": 4, "tokens": [5, IMAGE], "images": [{"base64": text}]},
        {"id": 5, "messages": [{"role": "tool", "content": [{"type": "image", "path": "a.jpg"}]}]},
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read_picture_jobs(folder: Path) -> list:
    return read_requests(folder / "jobs.jsonl", _picture_tokenizer(), 9, images=SETTINGS)


@functools.cache
def _picture_tokenizer() -> Tokenizer:
    return byte_tokenizer([*CHAT, *TOKENS])


KINDS = {
    kind.name: kind
    for kind in (
        Kind("safetensors", _write_safetensors, _read_source, _same_arrays,
             _named("model.safetensors")),
        Kind("index", lambda folder: _write_safetensors(folder, 2), _read_source, _same_arrays,
             _named("model.safetensors.index.json"), checked=True),
        Kind("config", _write_safetensors, _read_source, _same_arrays, _named("config.json")),
        Kind("pth", _write_meta, _read_source, _same_arrays,
             _named("consolidated.00.pth", "consolidated.01.pth"), checked=True),
        Kind("params", _write_meta, _read_source, _same_arrays, _named("params.json")),
        Kind("checkpoint", _write_checkpoint, _read_checkpoint, _same_arrays, _all_files,
             checked=True),
        Kind("document", _write_document, _read_document, _same_arrays, _all_files, checked=True),
        Kind("tokenizer", _write_tokenizer, _read_tokenizer, _equal, _all_files),
        Kind("jobs", _write_jobs, _read_jobs, _equal, _all_files),
        Kind("rows", _write_rows, _read_rows, _equal, _all_files),
        Kind("documents", _write_documents, _read_documents, _equal,
             _named("data/index.json", "data/documents.bin")),
        Kind("answers", _write_answers, _read_answers, _equal, _all_files),
        Kind("training", _write_yaml("train.yaml", TRAINING),
             lambda folder: read_train_config(folder / "train.yaml"), _equal, _all_files),
        Kind("mesh", _write_yaml("mesh.yaml", MESH),
             lambda folder: MeshConfig.parse(str(folder / "mesh.yaml")), _equal, _all_files),
        Kind("target", _write_yaml("target.yaml", TARGET),
             lambda folder: parse_target(str(folder / "target.yaml")), _equal, _all_files),
        Kind("tokens", _write_tokens, _read_tokens, _equal, _all_files),
        *(Kind(name, _write_pictures(name), _read_pictures, _equal, _all_files)
          for name in PICTURES),
        Kind("picture jobs", _write_picture_jobs, _read_picture_jobs, _equal, _named("jobs.jsonl")),
        *HEAD_KINDS,
        *BATCH_KINDS,
    )
}  # fmt: skip
