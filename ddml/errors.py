"""Errors that are meant for the user: one line, the same on every rank."""


class InputError(ValueError):
    """Something the user gave cannot be used: what was expected, what was received, what to do.

    Attributes
    ----------
    exit_code : int
        Of a program that ends with it.
    """

    exit_code = 1


class NonFiniteError(ArithmeticError):
    """A loss, gradient or residual is NaN or infinite where the method cannot reject the point."""


class CollectiveError(InputError):
    """An InputError that all ranks raise together, also in the middle of a run."""


class StoppedError(CollectiveError):
    """A signal asked to stop before there was a run; the exit code is what the user has chosen for that."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RunFileError(InputError):
    """A run file cannot be read or written; the message is one line: what was expected, found and can be done."""


def printable(text: object) -> str:
    """A text as a terminal may get it: line ends stay, all else that does not print is shown as its number.

    What files of others hold could move the cursor, set the title or write right to left.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
