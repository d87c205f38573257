"""Imported once by the fork server of benchmarks.ranks: everything that is slow to import."""

from parallel.compat import prepare_host

prepare_host()

import pretrain.trainer  # noqa: E402, F401
