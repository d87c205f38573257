"""The one exception of this package."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or used; the message says which, why and what to do."""
