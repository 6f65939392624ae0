"""A conversation that streams: python examples/chat.py CHECKPOINT."""

import sys

import jax

import jaxmoe
from jaxmoe.text import StreamDecoder, render


def main(checkpoint: str, questions: list[str]) -> None:
    """Answers each question, with all of the conversation before it."""
    mesh = jaxmoe.MeshConfig.parse("fsdp=-1").make()
    config, params = jaxmoe.load(checkpoint, mesh)
    tokenizer = jaxmoe.Tokenizer.load(checkpoint)
    sampling = jaxmoe.Sampling(temperature=0.6, top_p=0.9)
    messages = [{"role": "system", "content": "You answer in one sentence."}]
    with jax.set_mesh(mesh):
        for question in questions:
            messages.append({"role": "user", "content": question})
            request = jaxmoe.Request("0", tuple(render(messages, tokenizer)), max_new_tokens=24)
            decoder, answer = StreamDecoder(tokenizer), ""
            for token in jaxmoe.generate(config, params, [request], sampling):
                answer += (piece := decoder.push(token.token))
                print(piece, end="", flush=True)
            print(decoder.flush())
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1], ["Who made the heaven and the earth?", "And the waters?"])
