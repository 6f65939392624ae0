"""The one exception type for mistakes that the user can fix."""


class UserError(ValueError):
    """A mistake in a file, a flag or a value; one sentence that names it and the fix."""
