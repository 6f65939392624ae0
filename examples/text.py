"""Text in six lines: python examples/text.py CHECKPOINT."""

import sys

import jaxmoe


def main(checkpoint: str) -> None:
    """Continues a text on all devices."""
    mesh = jaxmoe.MeshConfig.parse("fsdp=-1").make()
    config, params = jaxmoe.load(checkpoint, mesh)
    tokenizer = jaxmoe.Tokenizer.load(checkpoint)
    prompt = "In the beginning"
    print(prompt, jaxmoe.generate_text(config, params, tokenizer, prompt, max_new_tokens=32))


if __name__ == "__main__":
    main(sys.argv[1])
