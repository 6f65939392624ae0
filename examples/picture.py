"""Questions about a picture: python examples/picture.py CHECKPOINT PICTURE QUESTION..."""

import sys

import jaxmoe


def main(checkpoint: str, picture: str, questions: list[str]) -> None:
    """Answers the questions side by side; the picture is read once for all of them."""
    llm = jaxmoe.LLM(checkpoint)
    seen = {"type": "image", "image": picture}  # a path, URL, Pillow image or array
    chats = [
        [{"role": "user", "content": [seen, {"type": "text", "text": question}]}]
        for question in questions
    ]
    greedy = jaxmoe.Sampling(temperature=0.0)
    for question, result in zip(questions, llm.chat(chats, greedy), strict=True):
        print(question, result.text)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] or ["What is written?"])
