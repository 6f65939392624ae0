"""From a prompt as text to its answer as text, in one call."""

import contextlib
from typing import Any, cast

import jax

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.engine import Request, fit_context, generate
from jaxmoe.generation.jobs import finished
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer, render


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

    Many requests at once are served faster by `generate`, which also yields tokens as they come.

    Args:
        config, params: as `jaxmoe.load` returns them.
        prompt: text to continue, or the messages of a chat, `{"role": ..., "content": ...}` each.
        max_new_tokens: the answer's length, at most.
        sampling: how tokens are chosen; default: `Sampling()`.

    Raises:
        UserError: for an empty prompt, messages that cannot be rendered, a prompt that fills the
            model's context, or logits that are not finite.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, bos=True)
    else:
        tokens = render(prompt, tokenizer)
    request = fit_context(config, Request("0", tuple(tokens), max_new_tokens))
    stop_ids = (*config.eos_token_ids, *tokenizer.stop_ids)
    with _mesh_of(params):
        stream = generate(config, params, [request], sampling or Sampling(), stop_ids=stop_ids)
        (record,) = (record for _, record in finished(stream, tokenizer) if record)
    if "error" in record:
        raise UserError(record["error"])
    return record["text"]


def _mesh_of(params: dict) -> contextlib.AbstractContextManager:
    """Sets the mesh that the parameters were loaded onto; arrays of one device have none."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.set_mesh(cast(jax.sharding.Mesh, sharding.mesh))
    return contextlib.nullcontext()
