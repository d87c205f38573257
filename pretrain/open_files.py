"""The limit of open files: process groups, shards and logs of a rank take some hundred."""

import resource

from pretrain.config import ConfigError

LEAST, WANTED = 64, 1 << 16


def raise_open_files() -> None:
    """Raise this process's limit as far as it may go. Raises ConfigError where that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    if soft != resource.RLIM_INFINITY and soft < LEAST:
        raise ConfigError(
            f"the limit of open files is {soft}, and a rank needs {LEAST} or more; raise it "
            f"with `ulimit -n {WANTED}` in the shell that starts this, or in limits.conf"
        )
