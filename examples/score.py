"""Which text the model expects more: python examples/score.py CHECKPOINT [TEXT...]."""

import math
import sys

import jaxmoe

TEXTS = ["In the beginning God created the heaven", "Heaven the created God beginning the in"]


def main(checkpoint: str, *texts: str) -> None:
    """Prints the perplexity of each text, and the token that was expected least."""
    llm = jaxmoe.LLM(checkpoint, dtype="float32")
    given = list(texts) or TEXTS
    for text, score in zip(given, llm.score(given), strict=True):
        least = min((x for x in score.logprobs if x is not None), key=lambda x: x.logprob)
        word = llm.tokenizer.decode([least.token])
        print(f"perplexity {math.exp(-score.mean):.1f}, least expected {word!r}: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
