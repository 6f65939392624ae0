"""What followed the last tokens of a text when they came before in it."""

from collections.abc import Sequence

LENGTHS = (5, 3)  # of the ends of a text that are looked up, the longest first
KEPT = 65_536  # newest tokens of a text that are looked up, at least
UNKNOWN, RATE = 0.5, 0.15  # share of lookups that are right: at first, and how fast it follows


class Lookup:
    """A text, and where its last tokens came before.

    Attributes:
        right: which share of the newest tokens was what the lookup had said, 0 to 1.
        answered: how many tokens of an answer it has taken.
    """

    def __init__(self, prompt: Sequence[int]):
        """Begins with a prompt."""
        self.right, self.answered = UNKNOWN, 0
        self._restart(prompt[-KEPT:])

    def _restart(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in LENGTHS]
        self._match: int | None = None
        for token in tokens:
            self._add(token)

    @property
    def found(self) -> bool:
        """Whether the last tokens came before."""
        return self._match is not None

    def take(self, answer: Sequence[int]) -> None:
        """Adds the new tokens of an answer, which is given whole."""
        for token in answer[self.answered :]:
            if self._match is not None:
                self.right += RATE * ((self._tokens[self._match] == token) - self.right)
            if len(self._tokens) == 2 * KEPT:
                self._restart(self._tokens[-KEPT:])
            self._add(token)
        self.answered = len(answer)

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        end, self._match = len(self._tokens), None
        for length, after in zip(LENGTHS, self._after, strict=True):
            if end < length:
                continue
            last = tuple(self._tokens[-length:])
            if self._match is None:
                self._match = after.get(last)
            after[last] = end

    def drafts(self, count: int) -> tuple[int, ...]:
        """What followed the last tokens when they came before; none if they did not.

        What goes beyond the text's end goes on with the drafts themselves, as a text does that
        repeats a few tokens.
        """
        if self._match is None:
            return ()
        found: list[int] = []
        for place in range(self._match, self._match + count):
            beyond = place - len(self._tokens)
            found.append(self._tokens[place] if beyond < 0 else found[beyond])
        return tuple(found)
