"""The exceptions of this package. Each message is a sentence that names the file and the remedy."""


class UntrustedError(ValueError):
    """Input from outside cannot be used. The command line prints the message and exits with 1."""


class UnsafeNameError(UntrustedError):
    """A name that leads out of its folder, or that no file should have."""


class UnsafeFileError(UntrustedError):
    """A link, folder, device or pipe in the place of a regular file, or a file too large."""


class RecordError(UntrustedError):
    """JSON that is damaged, or whose values have other types or ranges than the program reads."""
