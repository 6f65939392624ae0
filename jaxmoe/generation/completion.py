"""A request's answer while it is written: its text, what ends it, and its output record.

A stop string may begin and end inside tokens. The text is cut before it, and tokens and
log-probabilities at the same place: a token stays if all of its text does.
"""

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

from jaxmoe.errors import UserError
from jaxmoe.generation.grammar import Matcher
from jaxmoe.generation.logprobs import Logprob, entry
from jaxmoe.generation.request import ERROR, Request, Token
from jaxmoe.generation.sampling import NO_TOKEN, Sampling
from jaxmoe.generation.stopping import RepetitionWatch, StopStrings
from jaxmoe.text import StreamDecoder, Tokenizer

REPETITION = "repetition"
REPETITION_DETECTED = "repetition_detected"  # the stop reason; both words are vLLM's


class Completion:
    """The answer to a request, token by token.

    Attributes:
        request: the request.
        sampling: its settings.
        matcher: follows its grammar; None if it has none.
        finish_reason: None until the last token; then `stop`, `length`, `REPETITION` or `ERROR`.
        stop_reason: the stop string or the token of `stop_ids` that ended the answer, or
            `REPETITION_DETECTED`; None if the model's own stop token or the length did.
        count: how many tokens were generated, those that are cut off included.
        drafted: how many drafts the steps have tried, first, second, ... after the last token.
        accepted: of these, how many were right.
    """

    def __init__(
        self,
        request: Request,
        sampling: Sampling,
        end_ids: Iterable[int],
        tokenizer: Tokenizer | None = None,
        matcher: Matcher | None = None,
    ):
        """Begins an empty answer.

        Args:
            sampling: the request's own, else the run's default.
            end_ids: the model's own stop tokens.
            tokenizer: without one there is no text.
            matcher: at the start of `sampling.grammar`.

        Raises:
            UserError: if there are stop strings and no tokenizer.
        """
        if sampling.stop and tokenizer is None:
            raise UserError(f"request {request.id!r} has stop strings, but there is no tokenizer.")
        self.request, self.sampling, self.matcher = request, sampling, matcher
        self.finish_reason: str | None = None
        self.failure: str | None = None
        self.stop_reason: str | int | None = None
        self.count = 0
        self.drafted: list[int] = []
        self.accepted: list[int] = []
        self._end_ids = frozenset(() if sampling.ignore_eos else end_ids)
        self._text = _Text(tokenizer, sampling)
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] = []
        self._prompt_logprobs: list[Logprob] = []
        detection = sampling.repetition_detection
        self._repetition = RepetitionWatch(detection) if detection else None

    def count_draft(self, place: int, right: bool) -> None:
        """Counts a draft that a step has tried, by its place from 0 on; -1 for none."""
        if place == len(self.drafted):
            self.drafted.append(0)
            self.accepted.append(0)
        if place >= 0:
            self.drafted[place] += 1
            self.accepted[place] += right

    @property
    def text(self) -> str:
        """What has been shown; all of the answer's text once it is finished."""
        return "".join(self._text.shown)

    @property
    def tokens(self) -> list[int]:
        """The tokens so far, without those that are cut off."""
        return self._tokens[: self._text.kept]

    @property
    def logprobs(self) -> list[Logprob] | None:
        """The log-probabilities of `tokens`; None if the sampling does not ask for them."""
        return None if self.sampling.logprobs is None else self._logprobs[: self._text.kept]

    @property
    def prompt_logprobs(self) -> list[Logprob] | None:
        """The log-probabilities of the prompt's tokens after the first, as far as they are known.

        All are once the answer has begun. None if the sampling does not ask for them.
        """
        return None if self.sampling.prompt_logprobs is None else self._prompt_logprobs

    def push_prompt(
        self, logprobs: Sequence[float], tops: Sequence[Sequence[tuple[int, float]]]
    ) -> None:
        """Adds the log-probabilities of the prompt's next tokens; the first token has none.

        Args:
            logprobs: one for each token.
            tops: for each token, the likeliest tokens in its place and their log-probabilities.
        """
        most = self.sampling.prompt_logprobs or 0
        for logprob, top in zip(logprobs, tops, strict=True):
            token = self.request.tokens[len(self._prompt_logprobs) + 1]
            self._prompt_logprobs.append(Logprob(token, float(logprob), tuple(top[:most])))

    def push(
        self, token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()
    ) -> str:
        """Adds the next token; returns the text that may be shown now, which is never taken back.

        Sets `finish_reason` if it is the last.

        Args:
            token: `NO_TOKEN` if the logits were not finite.
            logprob: its log-probability, where the sampling asks for it.
            top: the likeliest tokens in its place and their log-probabilities, the likeliest first.
        """
        failed = token == NO_TOKEN or self.failure is not None
        if failed or (self.matcher is not None and not self.matcher.accept(token)):
            return self._finish(ERROR)
        self._keep(token, logprob, top)
        repeats = self._repetition is not None and self._repetition.push(token)
        shown, reason = self._end_by_token(token), "stop"
        if shown is None:
            shown = self._text.push(token, search=self._long_enough)
            self.stop_reason = self._text.stop
            reason = "stop" if self.stop_reason is not None else self._end_by_count(repeats)
        return shown + self._finish(reason) if reason else shown

    def _keep(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        self.count += 1
        self._tokens.append(token)
        if self.sampling.logprobs is None:
            return
        if logprob is None:
            raise ValueError("the sampling asks for log-probabilities, and none was given")
        self._logprobs.append(Logprob(token, float(logprob), tuple(top[: self.sampling.logprobs])))

    @property
    def _long_enough(self) -> bool:
        """Whether what ends an answer may end it with the newest token."""
        return self.count > self.sampling.min_tokens

    def _end_by_token(self, token: int) -> str | None:
        """The text that a stop token adds, which ends the answer; None for another token."""
        if not self._long_enough:
            return None
        if token in self._end_ids:
            return self._text.push(token, search=False)
        if token not in self.sampling.stop_ids:
            return None
        self.stop_reason = token
        if self.sampling.include_stop_in_output:
            return self._text.push(token, search=False)
        return self._text.cut()

    def _end_by_count(self, repeats: bool) -> str | None:
        if self.count == self.request.max_new_tokens:
            return "length"
        if repeats and self.count >= self.sampling.min_tokens:
            self.stop_reason = REPETITION_DETECTED
            return REPETITION
        return None

    def _finish(self, reason: str) -> str:
        """Ends the answer; returns the rest of its text."""
        self.finish_reason = reason
        return self._text.flush()

    def record(self) -> dict[str, Any]:
        """The output record of a finished answer."""
        record: dict[str, Any] = {
            "id": self.request.id,
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
        }
        if self.stop_reason is not None:
            record["stop_reason"] = self.stop_reason
        if self.logprobs is not None:
            record["logprobs"] = {"content": self._entries(self.logprobs)}
        if self.prompt_logprobs is not None:
            record["prompt_logprobs"] = [None, *self._entries(self.prompt_logprobs)]
        record["usage"] = {
            "prompt_tokens": len(self.request.tokens),
            "completion_tokens": self.count,
        }
        if self.finish_reason == ERROR:
            record["error"] = self._error()
        elif self._is_incomplete():
            record["warning"] = self._warning()
        return record

    def _entries(self, logprobs: Sequence[Logprob]) -> list[dict[str, Any]]:
        return [entry(one, self._tokenizer) for one in logprobs]

    def _error(self) -> str:
        if self.failure is not None:
            return f"request {self.request.id!r}: {self.failure}"
        if self.matcher is not None and self.matcher.error:
            return f"request {self.request.id!r}: its grammar cannot go on: {self.matcher.error}."
        return not_finite(self.request, self.count)

    def _is_incomplete(self) -> bool:
        """Whether the answer ended before its grammar allowed that."""
        if self.matcher is None:
            return False
        return len(self.tokens) < self.count or not self.matcher.may_end

    def _warning(self) -> str:
        is_json = self.sampling.grammar is not None and "json" in self.sampling.grammar.kind
        what = "its JSON" if is_json else "what its grammar asks for"
        if self.finish_reason == "length":
            return f"{what} is incomplete after {self.count} tokens; allow more."
        return f"{what} is incomplete: the answer was ended by {self.stop_reason!r}."


class CompletionToken(Token):
    """A generated token with the completion that it was pushed to; it unpacks as `Token` does.

    Attributes:
        completion: the answer so far.
        text: what `push` returned: it may be shown now.
    """

    completion: Completion
    text: str

    def __new__(cls, completion: Completion, token: int, text: str) -> "CompletionToken":
        """The token that `completion.push` has just returned `text` for."""
        self = super().__new__(cls, completion.request, token, completion.finish_reason)
        self.completion, self.text = completion, text
        return self


class _Text:
    """The text of an answer, with its stop strings.

    Attributes:
        shown: the pieces of text that were returned.
        stop: the stop string that has appeared; None if none has.
        kept: how many tokens stay, if the answer was cut.
    """

    def __init__(self, tokenizer: Tokenizer | None, sampling: Sampling):
        self.shown: list[str] = []
        self.stop: str | None = None
        self.kept: int | None = None
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._stops = StopStrings(sampling.stop)
        self._include = sampling.include_stop_in_output
        self._held = ""
        self._length = 0  # characters that were decoded
        self._ends: list[int] = []  # for each token, up to which character its text goes

    def push(self, token: int, search: bool) -> str:
        """Adds a token; returns the text that may be shown now."""
        if self._decoder is None:
            self._ends.append(0)
            return ""
        text = self._decoder.push(token)
        start = self._length - len(self._held)
        self._length += len(text)
        self._ends.append(self._length + self._decoder.pending)
        match = self._stops.push(text, search)
        if match is None:
            held = 0 if self._include else self._stops.held
            return self._show(self._held + text, held)
        self.stop, text = match.stop, self._held + text[: match.end]
        if not self._include:
            text = text.removesuffix(match.stop)
        self.kept = bisect.bisect_right(self._ends, start + len(text))
        self._decoder = None  # what comes after the match is no part of the text
        return self._show(text, 0)

    def cut(self) -> str:
        """Adds a token that is cut off, with its text; returns the text that may be shown now."""
        self.kept = len(self._ends)
        return self.flush()

    def flush(self) -> str:
        """The rest of the text, at its end."""
        rest = "" if self._decoder is None else self._decoder.flush()
        return self._show(self._held + rest, 0)

    def _show(self, text: str, held: int) -> str:
        """Shows text but for its last characters, which are held back; returns what is shown."""
        shown, self._held = text[: len(text) - held], text[len(text) - held :]
        self.shown.append(shown)
        return shown


def not_finite(request: Request, count: int) -> str:
    """The error message of a request that ended with `ERROR`."""
    return (
        f"request {request.id!r}: the model's logits after {count} new tokens are not finite; "
        "look for NaN in its weights with jaxmoe convert --verify, or compute in float32."
    )
