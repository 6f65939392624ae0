"""A conversation that streams: python examples/chat.py CHECKPOINT."""

import sys

import jaxmoe


def main(checkpoint: str, questions: list[str]) -> None:
    """Answers each question, with all of the conversation before it."""
    llm = jaxmoe.LLM(checkpoint)
    sampling = jaxmoe.Sampling(temperature=0.6, top_p=0.9)
    messages = [{"role": "system", "content": "You answer in one sentence."}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in llm.chat_stream(messages, sampling, max_new_tokens=24):
            answer += piece.text
            print(piece.text, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1], ["Who made the heaven and the earth?", "And the waters?"])
