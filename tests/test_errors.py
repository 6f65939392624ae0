"""A message is one line, whatever the values that it quotes hold."""

from jaxmoe.errors import UserError


def test_a_message_is_one_line_that_can_be_printed():
    assert str(UserError("a\nb \ud800.")) == "a b \\ud800."
    message = str(UserError("begin " + "x" * 10**6 + " end."))
    assert len(message) < 1100 and message.startswith("begin x") and message.endswith("x end.")
