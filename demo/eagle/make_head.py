"""Makes the demo model's draft head: `prepare` the text, train, `finish` (see demo/README.md)."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from demo.make_demo import DEMO, chapters, write_json
from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.heads import convert_head, load_head
from jaxmoe.eval.drafts import Acceptance, figures, measure, warning_of
from jaxmoe.mesh import MeshConfig
from jaxmoe.text import Tokenizer
from jaxmoe.train.config import TrainConfig, read_train_config
from jaxmoe.train.data import is_held_out
from jaxmoe.train.make_tokens import tokens_of

CONFIG = "configs/demo-eagle.yaml"
FOLDER = DEMO / "eagle"
ROWS, LENGTH, COUNT = 96, 256, 4  # of held-out text, and tokens of a chain
TEMPERATURES = (0.0, 0.6, 1.0)
BEGIN, END = "<!-- eagle, written by scripts/make_head.py -->\n", "<!-- end of eagle -->\n"
Record = dict[str, Any]


def prepare(config: TrainConfig) -> None:
    """Writes the tokens of all chapters, by the demo model's tokenizer."""
    texts = chapters()
    ids = tokens_of(texts, Tokenizer.load(DEMO / "model"))
    tokens = Path(str(config.rows.tokens))
    tokens.parent.mkdir(parents=True, exist_ok=True)
    np.save(tokens, ids)
    print(f"Wrote {len(ids):,} tokens of {len(texts):,} chapters to {tokens}.")


def held_out_rows(config: TrainConfig) -> np.ndarray:
    """The first tokens of the held-out chapters, one after the other, cut into rows."""
    every = config.rows.held_out_every
    texts = [text for i, text in enumerate(chapters()) if is_held_out(i, every)]
    ids = tokens_of(texts, Tokenizer.load(DEMO / "model"))
    return np.asarray(ids[: ROWS * LENGTH], np.int32).reshape(-1, LENGTH)


def finish(config: TrainConfig) -> None:
    """Copies the trained head to demo/eagle, measures it, and writes its numbers down."""
    shutil.rmtree(FOLDER / "head", ignore_errors=True)
    shutil.copytree(Path(config.output) / "head", FOLDER / "head")
    converted = Path(config.output).parent / "head"
    shutil.rmtree(converted, ignore_errors=True)
    report = convert_head(FOLDER / "head", converted, str(config.init))
    metrics: Record = {"steps": config.steps, "parameters": parameters(converted, config)}
    metrics |= {"layer_ids": list(report.config.layer_ids), **measured(config, converted)}
    write_json(FOLDER / "metrics.json", metrics)
    readme = DEMO / "README.md"
    readme.write_text(with_numbers(readme.read_text(), metrics))
    print(f"Wrote {FOLDER} and the numbers in {readme}.")


def parameters(head: Path, config: TrainConfig) -> int:
    """How many numbers the head has."""
    mesh = MeshConfig().make(jax.devices()[:1])
    loaded = load_head(head, mesh, store.read_config(str(config.init)))
    return sum(x.size for x in jax.tree.leaves(loaded.params))


def snippet() -> np.ndarray:
    """The tokens of the text in the demo model's metrics, as one row."""
    text = json.loads((DEMO / "metrics.json").read_text())["snippet"]["text"]
    return np.asarray([Tokenizer.load(DEMO / "model").encode(text, bos=True)], np.int32)


def measured(config: TrainConfig, folder: Path) -> Record:
    """What is accepted on held-out text, in float32; also with the layers before its own."""
    mesh = MeshConfig().make(jax.devices()[:1])
    model, params = store.load(str(config.init), mesh, "float32")
    head, rows = load_head(folder, mesh, model, "float32"), held_out_rows(config)
    shifted = tuple(i - 1 for i in head.config.layer_ids)
    wrong = head._replace(config=dataclasses.replace(head.config, layer_ids=shifted))
    with jax.set_mesh(mesh):
        found = measure(model, params, head, rows, TEMPERATURES, COUNT)
        other = measure(model, params, wrong, rows, TEMPERATURES[:1], 1)
        warning = warning_of(model, params, wrong, rows, other)
        of_snippet = measure(model, params, head, snippet(), TEMPERATURES, COUNT)
    return {
        "drafts": figures(found),
        "snippet": figures(of_snippet),
        "wrong_layers": {
            "layer_ids": list(shifted),
            "accepted": other[0].accepted[0],
            "warning": warning,
        },
    }


def with_numbers(readme: str, metrics: Record) -> str:
    """The README with the numbers of these metrics."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + markdown(metrics) + END + rest.split(END)[1]


def markdown(metrics: Record) -> str:
    """The table of what is accepted."""
    found = [Acceptance(**one) for one in metrics["drafts"]]
    count = len(found[0].accepted)
    firsts = " | ".join(f"first {n}" for n in range(1, count + 1))
    lines = [f"| temperature | {firsts} | tokens a step |", f"|---:|{'---:|' * (count + 1)}"]
    for one in found:
        shares = " | ".join(f"{share:.1%}" for share in one.accepted)
        lines.append(f"| {one.temperature:g} | {shares} | {one.tokens_per_step:.2f} |")
    ids, wrong = (
        ",".join(map(str, x)) for x in (metrics["layer_ids"], metrics["wrong_layers"]["layer_ids"])
    )
    said = (
        f"{metrics['parameters']:,} parameters, {metrics['steps']:,} steps; {found[0].chains:,} "
        f"chains. It reads the inputs of layers {ids}; given those of {wrong}, "
        f"{metrics['wrong_layers']['accepted']:.1%} of first guesses are accepted at temperature 0."
    )
    return "\n" + "\n".join(lines) + "\n\n" + said + "\n\n"


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("prepare", "finish"))
    command = {"prepare": prepare, "finish": finish}[parser.parse_args().command]
    command(read_train_config(CONFIG))
