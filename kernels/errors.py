"""The exception of this package that a user can act on."""

from untrusted.errors import UserError


class KernelsError(UserError, ValueError):
    """An environment variable or a target that the kernels cannot be used with."""

    exit_code = 2
