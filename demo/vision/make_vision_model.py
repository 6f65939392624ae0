"""Makes the demo model that sees: `train`, then `finish` (see demo/README.md)."""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from demo.make_demo import DEMO, SPECIALS, tokenizer_config, write_json
from demo.vision import digit_pictures, vision_report, vision_training
from jaxmoe.checkpoint.convert import convert
from jaxmoe.checkpoint.export import export
from jaxmoe.cli import devices
from jaxmoe.config import Llama4Config, vision_of
from jaxmoe.hf_config import from_hf
from jaxmoe.images import ImageSettings
from jaxmoe.model.params import num_params
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import TrainConfig, read_train_config

CONFIG = "configs/demo-vision.yaml"
IMAGE_SPECIALS = (
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)


OTHER_WORDS = (  # that fill up the vocabulary
    "\n\n system user assistant picture image handwritten digit number row column tile please look",
    "zero one two three four five six seven eight nine ten smallest answer in this and from left",
)


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that knows the questions, and takes digits one at a time."""
    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    specials = SPECIALS + IMAGE_SPECIALS
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    questions = [text for texts in digit_pictures.QUESTIONS.values() for text in texts]
    backend.train_from_iterator(3 * questions + [*OTHER_WORDS], trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return Tokenizer(backend)


def check_ids(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises an AssertionError unless the config's numbers of tokens are the tokenizer's."""
    text = config.model["text_config"]
    assert text["vocab_size"] == tokenizer.vocab_size, tokenizer.vocab_size
    assert text["bos_token_id"] == tokenizer.bos_id, tokenizer.specials
    assert sorted(text["eos_token_id"]) == sorted(tokenizer.stop_ids), tokenizer.specials
    assert text["pad_token_id"] == tokenizer.special("<|finetune_right_pad|>")
    assert config.model["image_token_index"] == tokenizer.special("<|patch|>")


def train(config: TrainConfig) -> None:
    """Writes the tokenizer and the settings of images, trains, and saves the checkpoint."""
    words = Path(str(config.tokenizer))
    words.mkdir(parents=True, exist_ok=True)
    text = config.model["text_config"]
    tokenizer = make_tokenizer(text["vocab_size"])
    check_ids(config, tokenizer)
    tokenizer.save(words)
    write_json(words / "tokenizer_config.json", tokenizer_config())
    ids = {key: text[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(words / "generation_config.json", ids | {"do_sample": False})
    model = from_hf(config.model, CONFIG)
    write_json(words / "preprocessor_config.json", preprocessor_config(model))
    print(f"{num_params(model):,} parameters", file=sys.stderr)
    mesh = devices.start(argparse.Namespace(mesh=None, cpu_devices=1))
    with jax.set_mesh(mesh):
        for record in vision_training.train(config, model, tokenizer, mesh):
            print(json.dumps(record), file=sys.stderr, flush=True)


def preprocessor_config(model: Llama4Config) -> dict:
    """What transformers' image processor reads."""
    settings = ImageSettings.of(vision_of(model))
    side = settings.tile_size
    return {
        "image_processor_type": "Llama4ImageProcessorFast",
        "size": {"height": side, "width": side},
        "max_patches": settings.max_tiles,
        "resize_to_max_canvas": settings.resize_to_max_canvas,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }


def finish(config: TrainConfig) -> None:
    """Exports the trained model to demo/vision/model, measures it, and writes its numbers down."""
    output, folder = Path(config.output), DEMO / "vision"
    shutil.rmtree(folder / "model", ignore_errors=True)
    export(output / "checkpoint", folder / "model")
    with tempfile.TemporaryDirectory() as checkpoint:
        convert(folder / "model", Path(checkpoint) / "model")
        report(config, Path(checkpoint) / "model", output.parent / "held-out")


def report(config: TrainConfig, checkpoint: Path, questions: Path) -> None:
    """Measures a converted model, and writes its numbers into demo/README.md."""
    folder, readme = DEMO / "vision", DEMO / "README.md"
    vision_report.write_questions(questions)
    vision_report.write_examples(folder / "held-out")
    count = {"parameters": num_params(from_hf(config.model, CONFIG)), "steps": config.steps}
    metrics = count | vision_report.measure(checkpoint, questions, folder / "held-out")
    write_json(folder / "metrics.json", metrics)
    readme.write_text(vision_report.with_numbers(readme.read_text(), metrics))
    print(f"Wrote {folder} and the numbers in {readme}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = {"train": train, "finish": finish}
    parser.add_argument("command", choices=tuple(commands))
    parser.add_argument("--config", default=CONFIG, metavar="FILE.yaml")
    args = parser.parse_args()
    commands[args.command](read_train_config(args.config))
