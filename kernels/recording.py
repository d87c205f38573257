"""Tells operations whether they are recorded, to run again with other values, or compiled.

The host must then read no value of a tensor. A decision that depends on values has to be made
inside a custom operator.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_recording = False


def is_recorded() -> bool:
    """Return whether the operations that run now will run again without Python."""
    return _recording or torch.compiler.is_compiling()


@contextmanager
def recording() -> Iterator[None]:
    """Declare that operations within the context are recorded."""
    global _recording
    before, _recording = _recording, True
    try:
        yield
    finally:
        _recording = before
