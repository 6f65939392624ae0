"""From a prompt as text to its answer as text, in one call."""

from typing import Any

from jaxmoe.config import Llama4Config
from jaxmoe.generation.llm import LLM
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer


def generate_text(
    config: Llama4Config,
    params: dict,
    tokenizer: Tokenizer,
    prompt: str | list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
) -> str:
    """The answer to one prompt, on the mesh that the parameters are laid out over.

    Many prompts at once are served faster by `LLM`, which also streams answers.

    Args:
        config, params: as `jaxmoe.load` returns them.
        prompt: text to continue, or the messages of a chat, `{"role": ..., "content": ...}` each.
        max_new_tokens: the answer's length, at most.
        sampling: how tokens are chosen; default: `Sampling()`.

    Raises:
        UserError: for an empty prompt, messages that cannot be rendered, a prompt that fills the
            model's context, or logits that are not finite.
    """
    llm = LLM.from_parts(config, params, tokenizer)
    answer = llm.generate if isinstance(prompt, str) else llm.chat
    (result,) = answer([prompt], sampling, max_new_tokens=max_new_tokens)
    return result.text
