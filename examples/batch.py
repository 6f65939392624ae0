"""Requests of a JSON lines file, batched: python examples/batch.py CHECKPOINT IN.jsonl OUT.jsonl.

A line is {"prompt": ...} or {"messages": [...]}. `jaxmoe generate --prompts` does more: each line
may have its own settings, and a job goes on where it was killed.
"""

import json
import sys
from pathlib import Path

import jaxmoe


def main(checkpoint: str, source: str, output: str) -> None:
    """Writes an answer a line, in the order of the requests; a bad line gets an error."""
    llm = jaxmoe.LLM(checkpoint, rows=8)
    lines = [json.loads(line) for line in Path(source).read_text().splitlines()]
    prompts = [
        jaxmoe.render(line["messages"], llm.tokenizer) if "messages" in line else line["prompt"]
        for line in lines
    ]
    with open(output, "w") as file:
        for result in llm.generate(prompts, max_new_tokens=16):
            file.write(json.dumps(result.record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
