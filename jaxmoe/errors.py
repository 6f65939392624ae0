"""The one exception type for mistakes that the user can fix."""

_LONGEST = 1000  # characters of a message, which may quote long values from files


class UserError(ValueError):
    """A mistake in a file, a flag or a value; the message is a sentence that names it and the fix.

    The message is one line that every terminal can print, whatever values it quotes.
    """

    def __init__(self, message: str):
        line = " ".join(message.split("\n")).encode(errors="backslashreplace").decode()
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class AbsentProcesses(UserError):
    """Other processes of one program did not come, as when they were taken away: run it again."""


def sentence_of(error: OSError) -> str:
    """What an error of the file system says, with the name of the file if it has one."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


class Stopped(Exception):
    """Work that was told to end early, and is saved: the same command goes on with it."""
