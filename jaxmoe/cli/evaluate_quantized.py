"""`jaxmoe evaluate quantized`: what a cache, or matrices, of 8 or 4 bits cost in quality."""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from jaxmoe.cli import devices
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.eval import needle_report
from jaxmoe.eval.logits import token_logits
from jaxmoe.files.outputs import check_writable, write_json
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.model.kv_cache import KV_FORMATS
from jaxmoe.model.params import abstract_params, quantize_params
from jaxmoe.progress import task_progress
from pallas_kernels.quantized import LARGEST

PREFILL_CHUNK = 128  # so few that most keys that are seen come out of the cache
Figures = dict[str, Any]


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommand and its flags."""
    parser = commands.add_parser("quantized", help="perplexity with caches or matrices quantized")
    parser.add_argument("checkpoint", help="folder that jaxmoe convert wrote")
    parser.add_argument(
        "--text", metavar="FILE", help="to measure on; default: what the model itself samples"
    )
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="of text")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--json", metavar="FILE", help="where to write the figures")
    devices.add_flags(parser)
    parser.set_defaults(run=main)


def main(args: argparse.Namespace) -> None:
    """Runs the command."""
    mesh = devices.start(args)
    if args.json:
        check_writable(args.json)
    tokenizer = devices.tokenizer(args.checkpoint)
    config, params = devices.load(args, mesh, text_only=True)
    with jax.set_mesh(mesh):
        if args.text:
            tokens = read_rows(args.text, tokenizer, args.rows, args.length)
        else:
            tokens = sampled_rows(config, params, args.rows, args.length, args.seed)
        figures = measure(config, params, tokens, mesh)
    if args.json:
        write_json(args.json, figures)
    needle_report.show(table(figures))


def read_rows(path: str, tokenizer, rows: int, length: int) -> np.ndarray:
    """The first tokens of a text, cut into rows."""
    if tokenizer is None:
        raise UserError("--text needs a tokenizer, and the checkpoint has none; leave --text out.")
    try:
        tokens = tokenizer.encode(Path(path).read_text(encoding="utf-8"), bos=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    if len(tokens) < rows * length:
        raise UserError(
            f"{path} has {len(tokens)} tokens, fewer than {rows} rows of {length}; use fewer."
        )
    return np.array(tokens[: rows * length], np.int32).reshape(rows, length)


def sampled_rows(
    config: Llama4Config, params: dict, rows: int, length: int, seed: int
) -> np.ndarray:
    """What the model writes at temperature 1: text of its own distribution."""
    requests = [Request(i, (config.bos_token_id,), length - 1) for i in range(rows)]
    written: list[list[int]] = [[config.bos_token_id] for _ in range(rows)]
    sampling = Sampling(temperature=1.0, seed=seed)
    with task_progress("Sampling", rows * (length - 1), "tokens") as advance:
        for token in generate(config, params, requests, sampling, rows=rows, stop_ids=()):
            written[int(str(token.request.id))].append(token.token)
            advance(1)
    return np.array(written, np.int32)


def measure(config: Llama4Config, params: dict, tokens: np.ndarray, mesh) -> Figures:
    """Nats a token as the checkpoint is, and what changes with each format."""
    plain = token_logits(config, params, tokens, prefill_chunk=PREFILL_CHUNK)
    base = nats(plain, tokens)
    results = []
    runs = [("cache", format) for format in KV_FORMATS] + [
        ("matrices", format) for format in LARGEST
    ]
    with task_progress("Measuring", len(runs), "formats") as advance:
        for part, format in runs:
            weights = params if part == "cache" else _quantized(config, params, format, mesh)
            kv = format if part == "cache" else None
            logits = token_logits(config, weights, tokens, prefill_chunk=PREFILL_CHUNK, kv=kv)
            error = float(np.sqrt(((logits - plain) ** 2).mean() / (plain**2).mean()))
            change = math.exp(nats(logits, tokens) - base) - 1
            results.append(
                {"part": part, "format": format, "logit_error": error, "perplexity": change}
            )
            advance(1)
    return {"tokens": int(tokens.size), "nats_per_token": base, "results": results}


def nats(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Mean cross entropy of each next token."""
    log_p = jax.nn.log_softmax(jnp.asarray(logits[:, :-1]))
    chosen = jnp.take_along_axis(log_p, jnp.asarray(tokens)[:, 1:, None], axis=-1)
    return float(-chosen.mean())


def _quantized(config: Llama4Config, params: dict, format: str, mesh) -> dict:
    shapes = abstract_params(config, mesh, params["embed"].dtype, format)
    places = jax.tree.map(lambda x: x.sharding, shapes)
    run = functools.partial(quantize_params, config, format=format)
    return jax.jit(run, out_shardings=places)(params)


def table(figures: Figures) -> Table:
    """The table that is printed; errors of logits are root mean squares over that of all logits."""
    shown = Table(
        title=f"{figures['tokens']} tokens, {figures['nats_per_token']:.4f} nats a token as it is"
    )
    shown.add_column("quantized")
    for column in ("format", "logit error", "perplexity"):
        shown.add_column(column, justify="right")
    for each in figures["results"]:
        error, change = f"{each['logit_error']:.2e}", f"{each['perplexity']:+.3%}"
        shown.add_row(each["part"], each["format"], error, change)
    return shown
