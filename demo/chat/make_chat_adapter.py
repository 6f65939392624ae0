"""Makes the demo model's adapter: `prepare` the chats, train, `finish` (see demo/README.md)."""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from safetensors.numpy import load_file

import jaxmoe
from demo import make_demo
from demo.make_demo import DEMO, verses_by_chapter, write_json
from jaxmoe.checkpoint import store
from jaxmoe.generation.results import Result
from jaxmoe.mesh import MeshConfig
from jaxmoe.train.config import TrainConfig, read_train_config
from jaxmoe.train.data import is_held_out
from jaxmoe.train.evaluation import held_out_loss
from jaxmoe.train.trainer import data_of

CONFIG = "configs/demo-lora.yaml"
OPENING = 5  # words of a verse that a prompt gives
ASKED = 50  # held-out prompts
KEPT = 16  # of them, in metrics.json with their answers
SHOWN, SHOWN_CHARACTERS = 2, 240  # of these, in the README
FORMAT = re.compile(r"\[(\w+ \d+:\d+)\] \S.*")
MAX_NEW_TOKENS = 96
SAMPLING = jaxmoe.Sampling(temperature=0.0, frequency_penalty=0.5)  # or it repeats itself for long
BEGIN = "<!-- chat, written by scripts/make_chat_adapter.py -->\n"
END = "<!-- end of chat -->\n"
Record = dict[str, Any]


def conversation(verse: re.Match) -> list[Record]:
    """A chat about a verse: the answer repeats its place and goes on after its first words."""
    book, chapter, number, text = verse.groups()
    place, words = f"{book} {chapter}:{number}", text.split()
    question = f"Continue {place}: {' '.join(words[:OPENING])}"
    answer = f"[{place}] {' '.join(words[OPENING:])}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def prepare(config: TrainConfig) -> None:
    """Writes the rows to train on and the held-out ones, a chat for each verse.

    The chapters that are held out are those that the model itself was not trained on.
    """
    found, every = verses_by_chapter(), read_train_config(make_demo.CONFIG).rows.held_out_every
    for held_out, path in enumerate((*config.rows.files, *config.rows.held_out)):
        chosen = [c for i, c in enumerate(found) if is_held_out(i, every) == held_out]
        verses = [v for chapter in chosen for v in chapter if len(v[4].split()) > OPENING]
        rows = [json.dumps({"messages": conversation(verse)}) + "\n" for verse in verses]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("".join(rows))
        print(f"Wrote {len(rows):,} chats to {path}.")


def finish(config: TrainConfig) -> None:
    """Copies the trained adapter to demo/chat, measures it, and writes its numbers down."""
    folder, readme = DEMO / "chat", DEMO / "README.md"
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    shutil.copytree(Path(config.output) / "adapter", folder / "adapter")
    metrics = measure(config, folder / "adapter")
    write_json(folder / "metrics.json", metrics)
    readme.write_text(with_numbers(readme.read_text(), metrics))
    print(f"Wrote {folder} and the numbers in {readme}.")


def measure(config: TrainConfig, adapter: Path) -> Record:
    """The numbers without and with the adapter, in float32, on chats that are held out."""
    lines = Path(config.rows.held_out[0]).read_text().splitlines()
    chats = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    asked = chats[:: len(chats) // ASKED][:ASKED]
    found: Record = {"held_out_chats": len(chats), "asked": ASKED, "steps": config.steps}
    found |= {"parameters": trained_parameters(adapter), "examples": asked[:KEPT]}
    questions = [question for question, _ in asked]
    for name, folder in (("before", None), ("after", adapter)):
        found[name] = measure_one(config, folder, questions)
    return found


def measure_one(config: TrainConfig, adapter: Path | None, questions: list[str]) -> Record:
    """The numbers with an adapter or without."""
    given = answers(str(config.init), adapter, questions)
    kept = {"answers": [result.text for result in given[:KEPT]]}
    return loss_of(config, adapter) | judge(questions, given) | kept


def loss_of(config: TrainConfig, adapter: Path | None) -> Record:
    """The loss of the answers of all held-out chats."""
    mesh, data = MeshConfig.parse("data=-1").make(), data_of(config)
    model, params = store.load(str(config.init), mesh, "float32", adapter=adapter)
    with jax.set_mesh(mesh):
        return held_out_loss(config, model, params, batches=data.held_out())


def trained_parameters(adapter: Path) -> int:
    """The number of an adapter's parameters."""
    return sum(tensor.size for tensor in load_file(adapter / "adapter_model.safetensors").values())


def answers(checkpoint: str | Path, adapter: Path | None, questions: list[str]) -> list[Result]:
    """An answer to each question, in float32."""
    llm = jaxmoe.LLM(checkpoint, dtype="float32", rows=64, adapter=adapter)
    chats = [[{"role": "user", "content": question}] for question in questions]
    return llm.chat(chats, SAMPLING, max_new_tokens=MAX_NEW_TOKENS)


def judge(questions: list[str], given: list[Result]) -> Record:
    """How many answers end by themselves in the format, and name the right book and verse."""
    found = [place_of(result) for result in given]
    asked = [question.removeprefix("Continue ").split() for question in questions]
    named = [(place.split(), words) for place, words in zip(found, asked, strict=True) if place]
    return {
        "in_format": len(named),
        "right_book": sum(place[0] == words[0] for place, words in named),
        "right_verse": sum(place == [words[0], words[1][:-1]] for place, words in named),
    }


def place_of(result: Result) -> str | None:
    """The place that an answer names; None if it is not in the format or does not end."""
    match = FORMAT.fullmatch(result.text)
    return match[1] if match and result.finish_reason == "stop" else None


def with_numbers(readme: str, metrics: Record) -> str:
    """The README with its numbers about chats replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + numbers(metrics) + END + rest.split(END)[1]


def numbers(metrics: Record) -> str:
    """The README's table of both models, and example answers."""
    sides = metrics["before"], metrics["after"]

    def share(name: str) -> str:
        return " | ".join(f"{side[name] / metrics['asked']:.1%}" for side in sides)

    losses = " | ".join(f"{side['held_out_loss']:.3f}" for side in sides)
    examples = zip(metrics["examples"], *(side["answers"] for side in sides), strict=True)
    rows = "\n".join(
        f"| {question} | {one_line(before)} | {one_line(after)} |"
        for (question, _), before, after in list(examples)[:SHOWN]
    )
    return f"""
| held out | before | after |
|---|---:|---:|
| answers in the format, of {metrics["asked"]} | {share("in_format")} |
| and of the book that was asked for | {share("right_book")} |
| and of its verse | {share("right_verse")} |
| nats a token of {metrics["held_out_chats"]:,} answers | {losses} |

{metrics["parameters"]:,} parameters trained in {metrics["steps"]} steps.

| question | the model alone | with the adapter |
|---|---|---|
{rows}

"""


def one_line(text: str) -> str:
    """A text within a table, cut if it is long."""
    text = text.replace("\n", "<br>").replace("|", "&#124;")
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = {"prepare": prepare, "finish": finish}
    parser.add_argument("command", choices=tuple(commands))
    commands[parser.parse_args().command](read_train_config(CONFIG))
