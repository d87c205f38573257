"""The exceptions of this package. Each message is a sentence that names the file and the remedy."""


class UntrustedError(ValueError):
    """Input from outside cannot be used. The command line prints the message and exits with 1."""


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
