"""Refuses requests one by one that the engine would refuse together with all others."""

import dataclasses
import functools
from collections.abc import Mapping

from jaxmoe.config import Llama4Config
from jaxmoe.errors import UserError
from jaxmoe.generation.grammar import GrammarCompiler
from jaxmoe.generation.request import (
    Request,
    check_adapter,
    check_room,
    fit_context,
    other_adapter,
    stop_ids_of,
    without_begin,
)
from jaxmoe.generation.sampling import Sampling
from jaxmoe.text import Tokenizer


@dataclasses.dataclass(frozen=True)
class Checker:
    """What requests are checked against.

    Attributes:
        config: of the model.
        tokenizer: None if there is none.
        default: the settings of requests that bring none.
        after: tokens of a document that requests come after.
        cache_tokens: that all rows together can hold; None is enough. A document's cache has room.
        adapters: those that requests choose, and the digest of each, None where it is not known.
        document_adapter: the digest of the adapter that the document was read with.
    """

    config: Llama4Config
    tokenizer: Tokenizer | None
    default: Sampling
    after: int = 0
    cache_tokens: int | None = None
    adapters: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    document_adapter: str | None = None

    def check(self, request: Request) -> Request:
        """The request that runs, with its settings, and as long as the context allows.

        Raises:
            UserError: if the engine would refuse it.
        """
        if self.after and self.tokenizer is not None:
            request = without_begin(request, self.tokenizer.bos_id)
        sampling = request.sampling or self.default
        own = dataclasses.replace(request, sampling=sampling)
        own = fit_context(self.config, own, self.after)
        if not self.after and self.cache_tokens is not None:
            check_room(own, self.cache_tokens)
        self._check_text(own, sampling)
        self._check_adapter(own)
        return own

    def _check_adapter(self, request: Request) -> None:
        check_adapter(request, tuple(self.adapters))
        if not self.after or not self.adapters:
            return  # of the parameters as they are, `load_document` compares the bits
        known = request.adapter is None or self.adapters[request.adapter] is not None
        digest = None if request.adapter is None else self.adapters[request.adapter]
        if known and digest != self.document_adapter:
            raise other_adapter(request)

    def _check_text(self, request: Request, sampling: Sampling) -> None:
        needs = "stop strings" if sampling.stop else "a grammar" if sampling.grammar else None
        if needs and self.tokenizer is None:
            raise UserError(f"request {request.id!r} has {needs}, but there is no tokenizer.")
        if sampling.grammar is not None:
            self._grammars.matcher(sampling.grammar)

    @functools.cached_property
    def _grammars(self) -> GrammarCompiler:
        assert self.tokenizer is not None
        stop_ids = stop_ids_of(self.config, self.tokenizer)
        return GrammarCompiler(self.tokenizer, self.config.vocab_size, stop_ids)
