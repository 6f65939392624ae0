"""`jaxmoe.LLM`: a checkpoint on its devices that answers lists of prompts, from one object."""

import functools
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxmoe.checkpoint import store
from jaxmoe.checkpoint.heads import Head, check_head, load_head
from jaxmoe.checkpoint.peft import adapter_digest
from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.background import Background
from jaxmoe.generation.checking import Checker
from jaxmoe.generation.completion import CompletionToken
from jaxmoe.generation.engine import STEP_TOKENS, generate
from jaxmoe.generation.features import FeatureTable
from jaxmoe.generation.jobs import Refusal
from jaxmoe.generation.placement import default_mesh, make_mesh, mesh_of, on_mesh
from jaxmoe.generation.prompts import (
    Wanted,
    as_conversations,
    as_prompts,
    read_conversation,
    read_prompt,
    read_prompts,
)
from jaxmoe.generation.request import Request, stop_ids_of
from jaxmoe.generation.results import (
    Piece,
    Result,
    Score,
    check_some,
    piece_of,
    refused_piece,
    results_of,
    score_of,
)
from jaxmoe.generation.sampling import Sampling, sampling_of
from jaxmoe.generation.saved_document import document_adapter, document_length, load_document_for
from jaxmoe.generation.turns import Turns
from jaxmoe.generation_config import FILE, read_generation_config
from jaxmoe.images import ImageSettings, PictureReader, read_image_settings
from jaxmoe.mesh import MeshConfig
from jaxmoe.model import transformer
from jaxmoe.model.adapters import adapter_names
from jaxmoe.text import Prompt, Tokenizer

MAX_NEW_TOKENS = 256


class LLM:
    """A model on its devices, with its tokenizer and its settings.

    The methods that answer take one prompt or several, and return a flat list of results in the
    order of the prompts. A prompt that cannot be used refuses itself: its result has an `error`,
    and the others are answered. If there is an error in every result, the first is raised as a
    `UserError`. The same call gives the same answers; another seed gives others.

    Threads may call at the same time: their steps take turns, and each call has a cache of its own.
    Coroutines wait for one another, so that one cache at a time is in use, in the order in which
    they asked.

    Attributes:
        config, params: as `jaxmoe.load` returns them.
        sampling: where a call gives none: the checkpoint's `generation_config.json`, else
            `Sampling()`. `dataclasses.replace(llm.sampling, seed=1)` changes one setting of it.
        images: the settings of how pictures become tiles and tokens, which may be replaced; no
            pictures. None if the model has no vision tower.
        mesh: the devices; None if the parameters are on one device without a mesh.
    """

    config: Llama4Config
    params: dict
    sampling: Sampling
    images: ImageSettings | None
    mesh: jax.sharding.Mesh | None

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        mesh: str | MeshConfig | jax.sharding.Mesh | None = None,
        dtype: Any = None,
        rows: int = 8,
        kv: str | None = None,
        cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        drafts: int | None = None,
        head: str | Path | None = None,
        text_only: bool = False,
        adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        forward: Callable = transformer.forward,
        progress: store.Progress = store.no_progress,
    ):
        """Loads a checkpoint.

        Args:
            checkpoint: a folder that `jaxmoe convert` wrote.
            mesh: axes and sizes, as "expert=4,tensor=2", or a mesh. Default: all devices, and every
                parameter on one of them only, as far as the model's sizes allow (`default_mesh`).
            dtype: to compute in; default: as stored.
            rows, kv, cache_tokens, step_tokens, drafts, forward: as for `jaxmoe.generate`.
            head: the folder of an EAGLE-3 head of this model that `jaxmoe convert` wrote.
            text_only: leaves a vision tower out.
            adapter, adapters: as for `jaxmoe.load`.
            progress: called after every array with the bytes done and the bytes in all.

        Raises:
            UserError: if the checkpoint cannot be used, or the mesh does not fit it.
        """
        if head is not None:
            check_head(head, store.read_config(checkpoint))
        dtype = dtype or store.main_dtypes(checkpoint, text_only)[0]
        tokenizer = Tokenizer.load_if_any(checkpoint)  # before what takes minutes
        sampling = sampling_of(checkpoint)
        for name in read_generation_config(checkpoint).unsupported:
            warnings.warn(f"{FILE} has {name}, which is not supported", stacklevel=2)
        placed = default_mesh(checkpoint, dtype, text_only) if mesh is None else make_mesh(mesh)
        kept = {"text_only": text_only, "adapter": adapter, "adapters": adapters}
        config, params = store.load(checkpoint, placed, dtype, progress, **kept)
        engine = {"kv": kv, "cache_tokens": cache_tokens, "rows": rows, "forward": forward}
        loaded = load_head(head, placed, config, dtype) if head is not None else None
        engine |= {"step_tokens": step_tokens, "drafts": drafts, "head": loaded}
        self._set(config, params, tokenizer, sampling, **engine)
        self._adapters |= {
            name: adapter_digest(folder) for name, folder in (adapters or {}).items()
        }
        if config.vision is not None:
            self.images = read_image_settings(checkpoint, config.vision)

    @classmethod
    def from_parts(
        cls,
        config: Llama4Config,
        params: dict,
        tokenizer: Tokenizer | None = None,
        *,
        sampling: Sampling | None = None,
        rows: int = 8,
        kv: str | None = None,
        cache_tokens: int | None = None,
        step_tokens: int = STEP_TOKENS,
        drafts: int | None = None,
        head: Head | None = None,
        forward: Callable = transformer.forward,
    ) -> "LLM":
        """An LLM of what is loaded already, on the mesh that the parameters are laid out over.

        Args:
            sampling: where a call gives none; default: `Sampling()`.
            rows, kv, cache_tokens, step_tokens, drafts, head, forward: as for `jaxmoe.generate`.
        """
        self = cls.__new__(cls)
        engine = {"kv": kv, "cache_tokens": cache_tokens, "rows": rows, "forward": forward}
        engine |= {"step_tokens": step_tokens, "drafts": drafts, "head": head}
        sampling = sampling or Sampling()
        self._set(config, params, tokenizer, sampling, **engine)
        return self

    def _set(self, config, params, tokenizer, sampling, **engine: Any) -> None:
        if engine["rows"] < 1:
            raise UserError(f"rows {engine['rows']} is below 1.")
        self.config, self.params, self._tokenizer = config, params, tokenizer
        self.sampling, self.mesh, self._engine = sampling, mesh_of(params), engine
        self.images = ImageSettings.of(config.vision) if config.vision is not None else None
        self._stop_ids = stop_ids_of(config, tokenizer)
        self._adapters: dict[str, str | None] = dict.fromkeys(adapter_names(params))
        self._turns, self._background = Turns(), Background()
        self._table: FeatureTable | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's.

        Raises:
            UserError: if there is none; prompts are lists of tokens then, and answers have no text.
        """
        if self._tokenizer is None:
            raise UserError(
                "the checkpoint has no tokenizer; copy the model's one into its folder."
            )
        return self._tokenizer

    def generate(
        self,
        prompts: Any,
        sampling: Any = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        n: int = 1,
        document: str | Path | None = None,
        adapter: Any = None,
    ) -> list[Result]:
        """The answers to prompts.

        Args:
            prompts: a text, a list of tokens, `{"prompt": either, "images": [...]}`, or a list of
                these. A text gets the begin-of-text token in front, tokens stay as they are. With
                images, `<image>` marks the place of each; they may be all that
                `jaxmoe.images.open_picture` takes.
            sampling: a `Sampling` for all prompts, or a list of one for each.
            max_new_tokens: the length of an answer, at most.
            n: answers to each prompt; those to the i-th are results i * n to i * n + n - 1.
            document: a folder that `jaxmoe read` wrote; each prompt follows its text.
            adapter: the name of one of `adapters` for all prompts, or a list of one or None for
                each. After a document it is that which its text was read with.

        Raises:
            UserError: if no prompt can be answered, or for settings that cannot be.
        """
        wanted: Any = {"max_new_tokens": max_new_tokens, "n": n, "document": document}
        return results_of(self.stream(prompts, sampling, **wanted, adapter=adapter))

    def chat(
        self,
        conversations: Any,
        sampling: Any = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        n: int = 1,
        document: str | Path | None = None,
        adapter: Any = None,
    ) -> list[Result]:
        """The assistant's next turn of conversations, by the checkpoint's chat template.

        Args:
            conversations: the messages of one, each `{"role": ..., "content": ...}`, or a list of
                several such lists. Pictures are items of the content, see
                `jaxmoe.text.render_chat`.
            tools: functions that the model may call, as JSON objects.
            sampling, max_new_tokens, n, document, adapter: as for `generate`.

        Raises:
            UserError: as `generate`.
        """
        wanted: Any = {"max_new_tokens": max_new_tokens, "n": n, "document": document}
        options = wanted | {"tools": tools, "adapter": adapter}
        return results_of(self.chat_stream(conversations, sampling, **options))

    def score(self, texts: Any, *, top: int = 0, adapter: Any = None) -> list[Score]:
        """How well the model predicts texts: the log-probabilities of their own tokens.

        A text may take all of the model's context but one token.

        Args:
            texts: as the prompts of `generate`.
            top: how many of the likeliest tokens are reported at each place.
            adapter: as for `generate`.

        Raises:
            UserError: if no text can be scored.
        """
        sampling = Sampling(temperature=0.0, prompt_logprobs=top)
        found = self.generate(texts, sampling, max_new_tokens=1, adapter=adapter)
        scores = list(map(score_of, found))
        check_some(scores)
        return scores

    def stream(
        self,
        prompts: Any,
        sampling: Any = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        n: int = 1,
        document: str | Path | None = None,
        adapter: Any = None,
    ) -> Iterator[Piece]:
        """The answers in pieces as they come; those of several are interleaved.

        Prompts are checked at once, and answered as the pieces are consumed. Arguments and errors
        are those of `generate`.
        """
        prompt_of = functools.partial(read_prompt, tokenizer=self._tokenizer, reader=self._reader())
        wanted = Wanted(sampling, max_new_tokens, n, adapter)
        return self._stream(as_prompts(prompts), prompt_of, wanted, document)

    def chat_stream(
        self,
        conversations: Any,
        sampling: Any = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        n: int = 1,
        document: str | Path | None = None,
        adapter: Any = None,
    ) -> Iterator[Piece]:
        """The assistant's next turns in pieces; arguments are as for `chat`."""
        prompt_of = functools.partial(
            read_conversation, tokenizer=self._tokenizer, tools=tools, reader=self._reader()
        )
        wanted = Wanted(sampling, max_new_tokens, n, adapter)
        return self._stream(as_conversations(conversations), prompt_of, wanted, document)

    async def agenerate(self, prompts: Any, sampling: Any = None, **options: Any) -> list[Result]:
        """`generate` without blocking the event loop; a cancelled call stops with its step."""
        return results_of([x async for x in self.astream(prompts, sampling, **options)])

    async def achat(self, conversations: Any, sampling: Any = None, **options: Any) -> list[Result]:
        """`chat` without blocking the event loop; a cancelled call stops with its step."""
        return results_of([x async for x in self.achat_stream(conversations, sampling, **options)])

    def astream(self, prompts: Any, sampling: Any = None, **options: Any) -> AsyncIterator[Piece]:
        """`stream` without blocking the event loop.

        Answers are generated whether or not pieces are consumed. Leaving the loop, or cancelling
        its task, ends that with the step that runs.
        """
        return self._background.iterate(lambda: self.stream(prompts, sampling, **options))

    def achat_stream(
        self, conversations: Any, sampling: Any = None, **options: Any
    ) -> AsyncIterator[Piece]:
        """`chat_stream` without blocking the event loop; see `astream`."""
        return self._background.iterate(
            lambda: self.chat_stream(conversations, sampling, **options)
        )

    def _stream(
        self,
        prompts: list[Any],
        prompt_of: Callable[[Any], Prompt],
        wanted: Wanted,
        document: str | Path | None,
    ) -> Iterator[Piece]:
        checker = Checker(
            self.config,
            self._tokenizer,
            self.sampling,
            document_length(document) if document is not None else 0,
            self._engine["cache_tokens"],
            self._adapters,
            document_adapter(document) if document is not None else None,
        )
        check, in_threads = checker.check, self.images is not None
        lines = read_prompts(prompts, prompt_of, wanted, self.sampling, check, in_threads)
        return self._answer(lines, document)

    def _reader(self) -> PictureReader | None:
        """What opens the pictures of a call; None if the model has no vision tower."""
        return PictureReader(self.images) if self.images is not None else None

    def _answer(
        self, lines: list[Request | Refusal], document: str | Path | None
    ) -> Iterator[Piece]:
        """Runs requests as the pieces are consumed.

        Between pieces neither the lock nor the mesh is held: what the consumer does in between, and
        in which thread it asks for the next one, is its own affair.
        """
        results: list[Result] = []
        for piece in self._pieces(lines, document):
            results += [piece.result] if piece.result is not None else []
            yield piece
        check_some(results)

    def _pieces(self, lines: list[Request | Refusal], document) -> Iterator[Piece]:
        places = {str(line.id): index for index, line in enumerate(lines)}
        requests = [line for line in lines if isinstance(line, Request)]
        for line in lines:
            if isinstance(line, Refusal):
                yield refused_piece(places[str(line.id)], line)
        tokens = self._in_turn(lambda: self._run(requests, document))
        while (token := self._in_turn(lambda: next(tokens, None))) is not None:
            yield piece_of(places[str(token.request.id)], token)

    def _in_turn[T](self, function: Callable[[], T]) -> T:
        """What a function returns that runs on the devices."""
        with self._turns, on_mesh(self.mesh):
            return function()

    def _run(self, requests: list[Request], document) -> Iterator[CompletionToken]:
        read, rows = None, self._engine["rows"]
        if document and requests:
            read = load_document_for(document, self.config, self.params, requests, rows)
        return generate(
            self.config,
            self.params,
            requests,
            self.sampling,
            stop_ids=self._stop_ids,
            tokenizer=self._tokenizer,
            document=read,
            features=self._features if any(request.pictures for request in requests) else None,
            **self._engine,
        )

    @property
    def _features(self) -> FeatureTable:
        """Features that calls share, so that an image is computed once in a conversation."""
        if self._table is None or self._table.params is not self.params["vision"]:
            self._table = FeatureTable(self.config, self.params)
        return self._table
