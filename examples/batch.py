"""Requests of a JSON lines file, batched: python examples/batch.py CHECKPOINT IN.jsonl OUT.jsonl.

A line is {"id": ..., "prompt": ...} or {"id": ..., "messages": [...]}. `jaxmoe generate --prompts`
does the same, and goes on where it was killed.
"""

import json
import sys

import jax

import jaxmoe
from jaxmoe.generation.jobs import finished, read_requests


def main(checkpoint: str, source: str, output: str) -> None:
    """Writes an answer a line, in the order in which they end."""
    mesh = jaxmoe.MeshConfig.parse("data=-1").make()
    config, params = jaxmoe.load(checkpoint, mesh)
    tokenizer = jaxmoe.Tokenizer.load(checkpoint)
    lines = read_requests(source, tokenizer, max_new_tokens=16)
    requests = [line for line in lines if isinstance(line, jaxmoe.Request)]
    with jax.set_mesh(mesh), open(output, "w") as file:
        stream = jaxmoe.generate(config, params, requests, jaxmoe.Sampling(), rows=8)
        for _, record in finished(stream, tokenizer):
            if record is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
