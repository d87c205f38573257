"""The one exception of this package."""

from untrusted.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written or used; the message says which, why and what to do."""
