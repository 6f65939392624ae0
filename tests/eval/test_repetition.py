"""How much of known strings repeats itself."""

import pytest

from jaxmoe.eval.repetition import Loop, find_loop, seen_fraction


@pytest.mark.parametrize(
    ("text", "n", "want"),
    [
        ("abcdefgh", 4, 0.0),
        ("aaaaaaaa", 4, 0.8),  # five 4-grams, four of them seen
        ("abcdabcd", 4, 0.2),
        ("abcabcabc", 3, 4 / 7),
        ("abab", 1, 0.5),
        ("abcd", 4, 0.0),
        ("abc", 4, None),  # holds no 4-gram: not 0, and not a division by 0
        ("", 4, None),
    ],
)
def test_seen_fraction(text, n, want):
    assert seen_fraction(text, n) == (None if want is None else pytest.approx(want))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("abcdefgh", Loop(0, 0, 0)),
        ("xyzabcabcabc", Loop(6, 3, 9)),
        ("xyzabcabcab", Loop(5, 3, 8)),  # cut within a period
        ("aaaa", Loop(3, 1, 4)),  # period 1, not 2
        ("abcxabc", Loop(3, 0, 0)),  # the suffix came before, but one period back is something else
        ("the end. the en", Loop(6, 0, 0)),
        ("aaaabbbbaaaab", Loop(5, 0, 0)),
        ("loop", Loop(0, 0, 0)),
        ("ee", Loop(1, 1, 2)),
        ("a", Loop(0, 0, 0)),
        ("", Loop(0, 0, 0)),
    ],
)
def test_find_loop(text, want):
    assert find_loop([ord(char) for char in text]) == want
