"""What transformers' chat templates make of messages, for tests of ours."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.models.llama4 import processing_llama4


def write_layouts(grids: list[tuple[int, int]], each: int, output: str) -> None:
    """Writes what stands in a text for an image of so many rows and columns of tiles."""
    layout = processing_llama4.Llama4Processor._prompt_split_image
    texts = [layout(None, grid, each) for grid in grids]
    Path(output).write_text(json.dumps(texts), encoding="utf-8")


def write_ids(tokenizer: str, chats: str, output: str) -> None:
    """Writes the ids of each chat of a JSON file, `{"template", "messages", "tools", "open"}`.

    The template called `llama4` is the one that transformers has for Llama 4; it is written into
    the tokenizer's folder too.
    """
    folder = Path(tokenizer)
    published = processing_llama4.chat_template
    (folder / "llama4.jinja").write_text(published, encoding="utf-8")
    reader = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot|>",
    )
    ids = [
        reader.apply_chat_template(
            chat["messages"],
            tools=chat["tools"],
            chat_template=published if chat["template"] == "llama4" else chat["template"],
            add_generation_prompt=chat["open"],
            tokenize=True,
            return_dict=False,
        )
        for chat in json.loads(Path(chats).read_text(encoding="utf-8"))
    ]
    Path(output).write_text(json.dumps(ids), encoding="utf-8")
