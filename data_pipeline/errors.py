"""The one exception of this package."""


class DataError(Exception):
    """Bad input or damaged data. The message is a paragraph for the person who has to mend it:

    the file, shard or field, what was found there, and what to do. The command line prints it
    and exits with 1.
    """
