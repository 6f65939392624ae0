"""A long document, asked twice: python examples/document.py CHECKPOINT TEXT FOLDER."""

import sys
from pathlib import Path

import jax

import jaxmoe


def main(checkpoint: str, text: str, folder: str) -> None:
    """Prefills the text once, saves what the model keeps of it, and asks two questions."""
    mesh = jaxmoe.MeshConfig.parse("fsdp=-1").make()
    config, params = jaxmoe.load(checkpoint, mesh)
    tokenizer = jaxmoe.Tokenizer.load(checkpoint)
    tokens = tokenizer.encode(Path(text).read_text(), bos=True)
    questions = [" And God said", " And it was"]
    requests = [
        jaxmoe.Request(question, tuple(tokenizer.encode(question)), max_new_tokens=16)
        for question in questions
    ]
    room = max(request.length for request in requests)
    answers: dict[object, list[int]] = {question: [] for question in questions}
    with jax.set_mesh(mesh):
        for done in jaxmoe.read_document(config, params, tokens, folder):
            print(f"{done} of {len(tokens)} tokens")
        document = jaxmoe.load_document(folder, config, params, room)  # on any mesh, at any time
        greedy = jaxmoe.Sampling(temperature=0.0)
        for token in jaxmoe.generate(config, params, requests, greedy, document=document):
            answers[token.request.id].append(token.token)
    for question, answer in answers.items():
        print(f"{question}{tokenizer.decode(answer)}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
