"""Answers that are JSON of a schema: python examples/structured.py CHECKPOINT."""

import json
import sys

import jaxmoe

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "day": {"type": "integer", "minimum": 1, "maximum": 7},
        "is_good": {"type": "boolean"},
    },
    "required": ["name", "day", "is_good"],
    "additionalProperties": False,
}


def main(checkpoint: str) -> None:
    """Prints three descriptions, each of which Python can read."""
    llm = jaxmoe.LLM(checkpoint)
    grammar = jaxmoe.Grammar("json_schema", json.dumps(SCHEMA))
    sampling = jaxmoe.Sampling(temperature=1.0, seed=7, grammar=grammar)
    messages = [{"role": "user", "content": "What was made, on which day, and was it good?"}]
    for result in llm.chat(messages, sampling, max_new_tokens=80, n=3):
        print(result.warning or json.loads(result.text))  # a warning: it was cut short


if __name__ == "__main__":
    main(sys.argv[1])
