"""The base of all errors that a user can act on, and the exceptions of this package.

Each message is a sentence that names the file and the remedy.
"""

import pickle
from typing import ClassVar


class UserError(Exception):
    """An error that a user can act on: what happened, why it cannot go on, what to do.

    The command line prints the message alone and exits with `exit_code`. Every other exception is a
    fault of the program, and is shown with its traceback.
    """

    exit_code: ClassVar[int] = 1


class UntrustedError(UserError, ValueError):
    """Input from outside cannot be used."""


class UnsafeNameError(UntrustedError):
    """A name that leads out of its folder, or that no file should have."""


class UnsafeFileError(UntrustedError):
    """A link, folder, device or pipe in the place of a regular file, or a file too large."""


class RecordError(UntrustedError):
    """JSON that is damaged, or whose values have other types or ranges than the program reads."""


def check_refusal(error: BaseException) -> None:
    """Raise `error` again unless a library refused its input with it.

    What pyo3 makes of a panic in a library written in Rust is no Exception.
    """
    if not isinstance(error, Exception) and not is_panic(error):
        raise error


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust gave up over its input."""
    return type(error).__name__ == "PanicException"


def transferable(error: Exception) -> Exception:
    """Return `error` if another process can unpickle it, else a RuntimeError with its text.

    Exceptions of other libraries often cannot: their constructors take other arguments than those
    that Exception keeps.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign constructor raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
