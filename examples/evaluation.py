"""How well a model predicts a text: python examples/evaluation.py CHECKPOINT."""

import sys

import jax
import numpy as np

import jaxmoe
from jaxmoe.eval.logits import token_logits

TEXT = "In the beginning God created the heaven and the earth."


def main(checkpoint: str, text: str = TEXT) -> None:
    """Prints the perplexity of the text, in one pass and token by token through the cache."""
    mesh = jaxmoe.MeshConfig.parse("fsdp=-1").make()
    config, params = jaxmoe.load(checkpoint, mesh, "float32")
    tokens = np.array([jaxmoe.Tokenizer.load(checkpoint).encode(text, bos=True)], np.int32)
    for name, decode_from in {"one pass": None, "token by token": 1}.items():
        with jax.set_mesh(mesh):
            logits = token_logits(config, params, tokens, decode_from=decode_from)
        log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
        nats = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()
        print(f"{name}: perplexity {np.exp(nats):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
