"""Measures the demo model beside a bigram model, and puts the numbers into its README."""

import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from jaxmoe.checkpoint import store
from jaxmoe.config import Llama4Config
from jaxmoe.generation.engine import Request, generate
from jaxmoe.generation.sampling import Sampling
from jaxmoe.mesh import MeshConfig
from jaxmoe.model.params import num_params
from jaxmoe.text import Tokenizer
from jaxmoe.train import data
from jaxmoe.train.config import TrainConfig
from jaxmoe.train.evaluation import held_out_loss
from jaxmoe.train.loss import next_tokens

PROMPT = "In the beginning"
SAMPLES = {  # tokens, and how they are chosen
    "greedy": (60, Sampling(temperature=0.0)),
    "sampled": (160, Sampling(temperature=0.8, top_p=0.9, seed=0)),
}
ADD_K = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SNIPPET = (  # in no text that the model has learned; longer than a chunk
    "And it came to pass, when the builders had finished their work, that they sat down beside the "
    "river and ate bread together. And one of them said, Let us now tell the elders of the city "
    "what we have done; for the wall is high, and the gates thereof are strong. And the elders "
    "heard them gladly, and gave them silver, and sent them away in peace."
)
BEGIN, END = "<!-- numbers, written by scripts/make_demo.py -->\n", "<!-- end of numbers -->\n"


def measure(config: TrainConfig, checkpoint: Path) -> dict:
    """The numbers of a converted demo model, computed in float32 from its bfloat16 weights."""
    mesh = MeshConfig.parse("data=-1").make()
    model, params = store.load(checkpoint, mesh, "float32")
    tokenizer = Tokenizer.load(checkpoint)
    tokens = data.read_tokens(str(config.rows.tokens))
    training, held_out = data.split(tokens, model.bos_token_id, config.rows.held_out_every)
    pairs = target_pairs(config, model, held_out)
    bits = bits_per_byte(tokenizer, pairs)
    with jax.set_mesh(mesh):
        nats = loss_of(config, model, params, held_out)
        snippet = snippet_loss(config, model, params, tokenizer)
        samples = continuations(model, params, tokenizer)
    k, bigram = best_bigram(training, pairs, model.vocab_size)
    return {
        "parameters": num_params(model),
        "training_tokens": len(training),
        "tokens_seen": config.steps * config.rows.batch_size * config.rows.length,
        "held_out_documents": int((held_out == model.bos_token_id).sum()),
        "held_out_targets": len(pairs),
        "model": {"nats_per_token": nats, "bits_per_byte": bits * nats},
        "bigram": {"nats_per_token": bigram, "bits_per_byte": bits * bigram, "add_k": k},
        "snippet": {"text": SNIPPET, "nats_per_token": snippet},
        "continuations": {"prompt": PROMPT, **samples},
    }


def loss_of(config: TrainConfig, model: Llama4Config, params: dict, tokens: np.ndarray) -> float:
    found = held_out_loss(config, model, params, batches=batches_of(config, model, tokens))
    return found["held_out_loss"]


def batches_of(
    config: TrainConfig, model: Llama4Config, tokens: np.ndarray
) -> Iterator[data.Batch]:
    rows = {"length": config.rows.length, "rows": config.rows.batch_size}
    return data.held_out_batches(tokens, model.bos_token_id, **rows)


def target_pairs(config: TrainConfig, model: Llama4Config, tokens: np.ndarray) -> np.ndarray:
    """[targets, 2]: each token that the held-out loss counts, after the one before it."""
    pairs = []
    for batch in batches_of(config, model, tokens):
        targets, real = map(np.asarray, next_tokens(*map(jax.numpy.asarray, batch[:2])))
        pairs.append(np.stack([batch.tokens[real], targets[real]], axis=1))
    return np.concatenate(pairs)


def bits_per_byte(tokenizer: Tokenizer, pairs: np.ndarray) -> float:
    """What one nat a token is in bits a byte; special tokens cost nats and have no bytes."""
    nbytes = sum(len(tokenizer.token_bytes(int(token))) for token in pairs[:, 1])
    return len(pairs) / nbytes / math.log(2)


def best_bigram(training: np.ndarray, pairs: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """The k of `ADD_K` with the lowest held-out loss of an add-k bigram model, and that loss."""
    counts = np.zeros((vocab_size, vocab_size))
    np.add.at(counts, (training[:-1], training[1:]), 1)
    before, after = pairs.T

    def loss(k: float) -> float:
        p = (counts[before, after] + k) / (counts.sum(1)[before] + k * vocab_size)
        return float(-np.log(p).mean())

    k = min(ADD_K, key=loss)
    return k, loss(k)


def snippet_loss(
    config: TrainConfig, model: Llama4Config, params: dict, tokenizer: Tokenizer
) -> float:
    tokens = np.array(tokenizer.encode(SNIPPET, bos=True))
    return loss_of(config, model, params, tokens)


def continuations(model: Llama4Config, params: dict, tokenizer: Tokenizer) -> dict[str, str]:
    prompt = tuple(tokenizer.encode(PROMPT, bos=True))
    texts = {}
    for name, (count, sampling) in SAMPLES.items():
        tokens = generate(model, params, [Request("0", prompt, count)], sampling, rows=1)
        texts[name] = tokenizer.decode([token.token for token in tokens])
    return texts


def with_numbers(readme: str, metrics: dict) -> str:
    """The README with its numbers replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + numbers(metrics) + END + rest.split(END)[1]


def numbers(metrics: dict) -> str:
    """The README's table and sample."""
    model, bigram = metrics["model"], metrics["bigram"]
    prompt, sampled = (metrics["continuations"][key] for key in ("prompt", "sampled"))
    quoted = "".join(f"> {line}\n" for line in (prompt + sampled).splitlines())
    return f"""
| held out | nats a token | bits a byte |
|---|---|---|
| this model | {model["nats_per_token"]:.3f} | {model["bits_per_byte"]:.3f} |
| bigram, add-k (k = {bigram["add_k"]}) | {bigram["nats_per_token"]:.3f} \
| {bigram["bits_per_byte"]:.3f} |

{metrics["parameters"]:,} parameters; {metrics["tokens_seen"]:,} tokens seen, from a text of \
{metrics["training_tokens"]:,}; {metrics["held_out_targets"]:,} tokens predicted in \
{metrics["held_out_documents"]} chapters held out.

What it writes after "{prompt}" at temperature 0.8, top-p 0.9 and seed 0:

{quoted}
"""
