"""What users can mend: a compiler or a tool that is not installed, or a device unknown to it."""


class CompilerError(ValueError):
    """A compiler for absent hardware that cannot be used; one sentence that names the fix."""
