"""Text in three lines: python examples/text.py CHECKPOINT."""

import sys

import jaxmoe


def main(checkpoint: str) -> None:
    """Continues texts on all devices."""
    llm = jaxmoe.LLM(checkpoint)
    prompts = ["In the beginning", "And God said"]
    for prompt, result in zip(prompts, llm.generate(prompts, max_new_tokens=32), strict=True):
        print(prompt, result.text)


if __name__ == "__main__":
    main(sys.argv[1])
