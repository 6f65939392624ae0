"""Errors that users can fix."""


class CompilerError(ValueError):
    """A compiler or tool is not installed, or does not know a device; the message names the fix."""
