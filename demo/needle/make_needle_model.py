"""Makes the needle model: `train`, then `finish`, and `report` once it is measured.

`train` goes on where it was killed. demo/needle/README.md has all commands.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import jax
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from demo.make_demo import SPECIALS, tokenizer_config, write_json
from demo.needle import needle_data, needle_training
from jaxmoe.checkpoint.export import export
from jaxmoe.cli import devices
from jaxmoe.eval import needle_report
from jaxmoe.eval.needle import ANSWER, HAYSTACK, NEEDLE, QUESTION
from jaxmoe.hf_config import from_hf
from jaxmoe.model.params import num_params
from jaxmoe.text import Tokenizer

SEED = 0
OUTPUT = Path("build/needle-training")
DEMO = Path("demo/needle")
MODEL = {  # Maverick's architecture: dense and MoE layers in turn, no QK norm, unscaled rotation
    "model_type": "llama4_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,  # the last is global
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "attention_chunk_size": 8192,
    "rope_theta": 10000.0,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "max_position_embeddings": needle_data.LONGEST,
}


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that knows the task's words, and takes digits one at a time."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    texts = [HAYSTACK, *(text.format(key="0") for text in (NEEDLE, QUESTION, ANSWER))]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return Tokenizer(backend)


def model_config(tokenizer: Tokenizer) -> dict:
    """The Hugging Face config.json, with the tokenizer's numbers."""
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.special("<|finetune_right_pad|>"),
    }
    return MODEL | {"vocab_size": tokenizer.vocab_size} | ids


def train(output: Path) -> None:
    """Writes the tokenizer, trains, and saves the checkpoint."""
    words = output.with_name(output.name + "-tokenizer")
    words.mkdir(parents=True, exist_ok=True)
    mesh = devices.start(argparse.Namespace(mesh=None, cpu_devices=1))
    tokenizer = make_tokenizer()
    tokenizer.save(words)
    write_json(words / "tokenizer_config.json", tokenizer_config())
    config = needle_training.run_config(model_config(tokenizer), words, output, SEED)
    task = needle_data.Task(tokenizer, MODEL["attention_chunk_size"])
    count = num_params(from_hf(config.model, "MODEL"))
    print(f"{count:,} parameters, {tokenizer.vocab_size} tokens", file=sys.stderr)
    with jax.set_mesh(mesh):
        for record in needle_training.train(config, task, mesh):
            print(json.dumps(record), file=sys.stderr, flush=True)


def finish(output: Path) -> None:
    """Exports the trained model to demo/needle/model."""
    shutil.rmtree(DEMO / "model", ignore_errors=True)
    export(output / "checkpoint", DEMO / "model")
    print(f"Wrote {DEMO}/model.")


def report(output: Path) -> None:
    """Puts what jaxmoe evaluate measured into demo/needle/README.md."""
    readme = DEMO / "README.md"
    metrics = json.loads((DEMO / "metrics.json").read_text())
    readme.write_text(needle_report.with_numbers(readme.read_text(), metrics))
    print(f"Wrote the numbers in {readme}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = {"train": train, "finish": finish, "report": report}
    parser.add_argument("command", choices=tuple(commands))
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    args = parser.parse_args()
    commands[args.command](args.output)
