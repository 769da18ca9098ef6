"""Score-based diffusion for medical images with few labels: the library of the book."""

__version__ = "0.1.0"


class UserError(Exception):
    """A fault in what the user gave, told in one sentence.

    The sentence says what was found, what is needed, and in which file.
    Command lines print it and exit with status 2; notebooks show it alone, without a stack trace.
    """

    def _render_traceback_(self):
        return [f"UserError: {self}"]
