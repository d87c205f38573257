"""The exceptions of this package."""

from untrusted.errors import UserError


class DataError(UserError):
    """Bad input or damaged data. The message is a paragraph for the person who has to mend it:

    the file, shard or field, what was found there, and what to do.
    """


class BadFileError(DataError):
    """A file that is missing, cut off, damaged or not to be downloaded.

    A fault of this node (no space, no permission, too many open files) is a bare DataError.
    """


class BadShardError(DataError):
    """A shard that cannot be had whole: one of its files is bad."""

    def __init__(self, message: str, folder: str, shard: int) -> None:
        """folder: of the shards, as it was named; shard: its number in index.json."""
        super().__init__(message)
        self.folder, self.shard = folder, shard

    def __reduce__(self) -> tuple[type["BadShardError"], tuple[str, str, int]]:
        """Give the constructor its arguments in another process, too."""
        return type(self), (str(self), self.folder, self.shard)
